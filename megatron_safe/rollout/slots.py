"""Which sample sits in which slot, and what a tick computes for it: decided alike on every rank, from the tokens alone.

Legend: B samples, P longest prompt, N most new tokens, C samples in slots now, R rows = C + prompt rows, W cache
writes.
"""

from collections import deque
from dataclasses import dataclass

import numpy
import torch

from megatron_safe.data.batches import TokenBatch

PREFILL_ROWS = 4096
"""Prompt tokens computed in one tick; further newcomers wait. It bounds the memory of activations."""


@dataclass(frozen=True)
class Tick:
    """What one forward computes: first the C samples' newest tokens, slot by slot, then the newcomers' prompt rows.

    The newest token of a newcomer is the last one of its prompt.

    tokens_R, positions_R: of each row. places_C: where in [B, N] the token sampled from each slot goes, flattened; B N,
    one past the end, for a sample that has ended. ends_C: one past the last place that is the sample's own. longest: no
    position of the C samples is larger. prompts: how many rows each newcomer's prompt has. slots_W, positions_W: the
    cells that keys and values go to. rows_W: the rows they are of; None: each row goes to one place, in order (a prompt
    that is sampled several times goes to several).
    """

    tokens_R: torch.Tensor
    positions_R: torch.Tensor
    places_C: torch.Tensor
    ends_C: torch.Tensor
    longest: int
    prompts: list[int]
    slots_W: torch.Tensor
    positions_W: torch.Tensor
    rows_W: torch.Tensor | None

    @property
    def samples(self) -> int:
        return self.places_C.size(0)

    def next(self, tokens_C: torch.Tensor, eos_id: int, nowhere: int, positions: int) -> "Tick":
        """The tick after this one for the same samples, made on the device: whoever has ended stays and is computed.

        nowhere: B N. positions: of a slot; an ended sample goes no further.
        """
        count = self.samples
        places_C = self.places_C + 1
        over_C = (tokens_C == eos_id) | (places_C >= self.ends_C)  # `nowhere` + 1 is beyond every end, too
        positions_C = (self.positions_R[:count] + 1).clamp_(max=positions - 1)
        return Tick(
            tokens_R=tokens_C,
            positions_R=positions_C,
            places_C=places_C.masked_fill_(over_C, nowhere),
            ends_C=self.ends_C,
            longest=min(self.longest + 1, positions - 1),
            prompts=[],
            slots_W=self.slots_W[:count],
            positions_W=positions_C,
            rows_W=None,
        )


class Queue:
    """The samples nobody has begun with, in order."""

    def __init__(self, prompts: TokenBatch, max_new_tokens: int, limits_B: torch.Tensor):
        """limits_B: after how many tokens an answer is cut, at most `max_new_tokens`. Nothing is planned by it."""
        self.tokens_BP = prompts.tokens_BL.cpu().numpy()
        self.lengths = prompts.prompt_lengths_B.tolist()
        self.max_new_tokens, self.limits = max_new_tokens, limits_B.tolist()
        self._waiting = deque(range(len(self.lengths)))
        self.prompts = [row[:n].tobytes() for row, n in zip(self.tokens_BP, self.lengths, strict=True)]

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def next(self) -> int:
        return self._waiting[0]

    def pop(self) -> int:
        return self._waiting.popleft()


class Slots:
    """The slots of one group of samples. The occupied ones are always the first C: no hole is ever computed.

    A round is `admit` (fill what is free, close what stays so), `tick` (what to compute first), and `learn` (what was
    sampled in this tick, and in those that followed from it by `Tick.next`).
    """

    def __init__(self, size: int, queue: Queue, eos_id: int, copy):
        """`copy(source, target, positions)` copies cells of the cache from slot to slot."""
        self._size, self._queue, self._eos_id, self._copy = size, queue, eos_id, copy
        self._samples: list[int] = []  # of the first C slots
        self._tokens = numpy.zeros(size, dtype=numpy.int64)
        self._positions = numpy.zeros(size, dtype=numpy.int64)
        self._places = numpy.zeros(size, dtype=numpy.int64)
        self._left = numpy.zeros(size, dtype=numpy.int64)  # tokens that may still be sampled
        self._holes: list[int] = []  # slots whose samples ended in the last round
        self._newcomers: list[tuple[int, list[int]]] = []  # (sample, slots that share its prompt)

    def __bool__(self) -> bool:
        return bool(self._samples)

    def admit(self) -> None:
        """Fill free slots from the queue. A prompt that is in a slot already, or comes next to its equal, is not
        computed again."""
        self._newcomers = []
        queue, rows, begun = self._queue, 0, {}
        free = self._holes[::-1]
        resident = {}
        if queue:
            resident = {queue.prompts[sample]: slot for slot, sample in enumerate(self._samples) if slot not in free}
        while queue and (free or len(self._samples) < self._size):
            sample = queue.next()
            prompt, before = queue.prompts[sample], queue.lengths[sample] - 1
            if before and prompt not in begun and prompt not in resident:
                if rows and rows + before > PREFILL_ROWS:
                    break
                rows += before
                begun[prompt] = []
                self._newcomers.append((sample, begun[prompt]))
            if not free:
                free.append(len(self._samples))
                self._samples.append(sample)
            slot = free.pop()
            if prompt in begun:
                begun[prompt].append(slot)
            elif before:
                self._copy(resident[prompt], slot, before)
            self._samples[slot] = queue.pop()
            self._tokens[slot] = queue.tokens_BP[sample, before]
            self._positions[slot] = before
            self._places[slot] = sample * queue.max_new_tokens
            self._left[slot] = queue.limits[sample]
        for hole in free:  # from behind: what moves down has not ended
            self._close(hole)
        self._holes = []

    def _close(self, hole: int) -> None:
        """Nobody waits: the last sample moves into the hole."""
        last = len(self._samples) - 1
        if hole < last:
            self._copy(last, hole, int(self._positions[last]))
            self._samples[hole] = self._samples[last]
            for state in (self._tokens, self._positions, self._places, self._left):
                state[hole] = state[last]
        self._samples.pop()

    def tick(self, device: torch.device) -> Tick:
        count = len(self._samples)
        tokens, positions = [self._tokens[:count]], [self._positions[:count]]
        slots, cells, rows = [numpy.arange(count)], [self._positions[:count]], [numpy.arange(count)]
        start = count
        for sample, shared_by in self._newcomers:
            before = self._queue.lengths[sample] - 1
            own = numpy.arange(before)
            tokens.append(self._queue.tokens_BP[sample, :before])
            positions.append(own)
            slots.append(numpy.repeat(shared_by, before))
            cells.append(numpy.tile(own, len(shared_by)))
            rows.append(numpy.tile(start + own, len(shared_by)))
            start += before

        def tensor(parts):
            return torch.from_numpy(numpy.concatenate(parts)).to(device)

        return Tick(
            tokens_R=tensor(tokens),
            positions_R=tensor(positions),
            places_C=tensor([self._places[:count]]),
            ends_C=tensor([self._places[:count] + self._left[:count]]),
            longest=int(positions[0].max()),
            prompts=[len(own) for own in positions[1:]],
            slots_W=tensor(slots),
            positions_W=tensor(cells),
            rows_W=tensor(rows) if any(len(shared_by) > 1 for _, shared_by in self._newcomers) else None,
        )

    def most_left(self) -> int:
        """How many tokens may still be sampled for the sample that may have the most."""
        return int(self._left[: len(self._samples)].max())

    def learn(self, tokens_ZC: torch.Tensor) -> None:
        """Take in what was sampled in Z ticks; what comes after a sample's end is nobody's."""
        count = len(self._samples)
        ended = numpy.zeros(count, dtype=bool)
        for sampled in tokens_ZC.cpu().numpy():
            going = ~ended
            self._tokens[:count][going] = sampled[going]
            self._positions[:count] += going
            self._places[:count] += going
            self._left[:count] -= going
            ended |= (sampled == self._eos_id) | (self._left[:count] == 0)
        self._holes = numpy.flatnonzero(ended).tolist()
