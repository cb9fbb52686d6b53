"""Rows of different lengths, laid end to end: what the models read instead of padded batches.

With context parallelism a pack's tokens are dealt over ranks: each has a part of every sequence, in contiguous pieces,
and attends with it to the keys of all ranks.

Legend: B rows of S columns, T tokens of a pack (on this rank), n sequences in it (pieces), N places that are read.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch

from megatron_safe.models.context_parallel import Keys, keys_of, owners


@dataclass(frozen=True)
class Sequences:
    """Right-padded rows, and the places at which a model's output is wanted.

    tokens_BS: int64. lengths_B: int64, 1 to S. read_BS: bool, inside the rows; its N places count row by row.
    """

    tokens_BS: torch.Tensor
    lengths_B: torch.Tensor
    read_BS: torch.Tensor

    @classmethod
    def to_last(cls, tokens_BS: torch.Tensor, lengths_B: torch.Tensor) -> "Sequences":
        """Read at each row's last token, where reward and cost models judge the whole answer: N = B."""
        columns_S = torch.arange(tokens_BS.size(1), device=tokens_BS.device)
        return cls(tokens_BS, lengths_B, columns_S == lengths_B[:, None] - 1)

    @classmethod
    def to_predict(cls, tokens_BL: torch.Tensor, lengths_B: torch.Tensor, mask_BT: torch.Tensor) -> "Sequences":
        """Read where `mask_BT` says; column t predicts token t + 1, so that nobody reads a row's last token."""
        return cls(tokens_BL[:, :-1], lengths_B - 1, mask_BT)


@dataclass(frozen=True)
class Pack:
    """Sequences end to end: one micro-batch of a model.

    tokens_1T, positions_T: int64, each sequence counted from 0.
    lengths: of the n sequences (pieces of them, where keys are given), in order; they add up to T.
    offsets: int32 [n + 1], where each begins; on the device.
    read_N: int64, the rows of T that are read out, in order; only they go through the last layer's MLP and the head.
    places_N: int64, which of the N places of all rows these are.
    keys: None where this rank has whole sequences, each of which attends to itself.
    """

    tokens_1T: torch.Tensor
    positions_T: torch.Tensor
    lengths: tuple[int, ...]
    offsets: torch.Tensor
    read_N: torch.Tensor
    places_N: torch.Tensor
    keys: Keys | None = None

    @property
    def longest(self) -> int:
        """More than any position."""
        return max(self.lengths if self.keys is None else self.keys.lengths)

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """(sequences, length, keys of each) of neighbours that are equally long."""
        key_lengths = self.lengths if self.keys is None else self.keys.lengths
        for (length, keys), run in groupby(zip(self.lengths, key_lengths, strict=True)):
            yield len(list(run)), length, keys


def pack(
    sequences: Sequences,
    max_tokens: int,
    at_least: int = 1,
    together: int = 1,
    equal: bool = False,
    multiple: int = 1,
    share: tuple[int, int] = (0, 1),
    round_of: int = 1,
) -> list[Pack]:
    """Fill packs with about the same number of tokens each.

    Args:
        max_tokens: of a pack; sequences that are longer by themselves get one of their own.
        at_least: how many packs there shall be, if there are rows enough (to fill a pipeline).
        together: so many neighbouring rows stay neighbours in one pack (the two answers of a pair); B is a multiple.
        equal: pad every pack to the longest one's T with a sequence of its own that nobody reads.
        multiple: pad likewise until T is a multiple of it.
        share: context-parallel rank and size. Each rank calls this with the same sequences and gets its part of every
            pack; T is the same for all, and the rows of a unit (`together`) have their last tokens on one rank.
        round_of: the number of packs is a multiple of it; those that are missing are padding (and `equal` is True).
    """
    lengths = sequences.lengths_B.tolist()
    sizes = [sum(lengths[i : i + together]) for i in range(0, len(lengths), together)]
    needed = -(-sum(min(size, max_tokens) for size in sizes) // max_tokens)
    count = min(len(sizes), max(at_least, needed))
    parts = _cut(sizes, count)
    while any(len(part) > 1 and sum(sizes[unit] for unit in part) > max_tokens for part in parts):
        count += 1
        parts = _cut(sizes, count)
    _, ranks = share
    read_BS = sequences.read_BS.cpu()  # indices are worked out on the host, whatever the device
    order_BS = read_BS.flatten().cumsum(0).view(read_BS.shape) - 1
    laid_out = []
    for part in parts:
        # Neighbours of equal length share that call.
        part.sort(key=lambda unit: (lengths[unit * together], unit))
        rows = torch.tensor([unit * together + i for unit in part for i in range(together)])
        laid_out.append(_lay_out(rows, torch.tensor([lengths[row] for row in rows.tolist()]), together, ranks))
    empty = torch.empty(0, dtype=torch.int64)
    laid_out += [_LaidOut(empty, empty, empty)] * (-len(laid_out) % round_of)
    widths = [int(each.owner_T.bincount(minlength=1).max()) for each in laid_out]
    widths = [-(-(max(widths) if equal else width) // multiple) * multiple for width in widths]
    return [
        _pack(sequences, each, width, share, read_BS, order_BS)
        for each, width in zip(laid_out, widths, strict=True)
    ]


def _cut(sizes: list[int], count: int) -> list[list[int]]:
    """Which sizes go where: longest first, and the row of them cut into `count` pieces of about the same sum, so that a
    pack holds what is about equally long. That is what a CPU's attention computes in one call."""
    waiting = sorted(range(len(sizes)), key=lambda unit: sizes[unit])
    left, parts = sum(sizes), []
    for to_come in reversed(range(count)):
        goal, part, weight = left / (to_come + 1), [], 0
        while len(waiting) > to_come and (not part or weight + sizes[waiting[-1]] / 2 <= goal):
            weight += sizes[waiting[-1]]
            part.append(waiting.pop())
        left -= weight
        parts.append(part)
    return parts


class _LaidOut(NamedTuple):
    """A pack as a whole, on the host: of each of its tokens the row, the column, and the context-parallel rank."""

    row_T: torch.Tensor
    position_T: torch.Tensor
    owner_T: torch.Tensor


def _lay_out(rows: torch.Tensor, lengths_n: torch.Tensor, together: int, ranks: int) -> _LaidOut:
    ends = lengths_n.cumsum(0)
    row_T = rows.repeat_interleave(lengths_n)
    position_T = torch.arange(len(row_T)) - (ends - lengths_n).repeat_interleave(lengths_n)
    return _LaidOut(row_T, position_T, owners(lengths_n, position_T, together, ranks))


def _pack(sequences: Sequences, whole: _LaidOut, width: int, share: tuple[int, int], read_BS, order_BS) -> Pack:
    """A rank's part of a pack (all of it, where there is one rank), padded to `width` tokens."""
    (rank, ranks), device = share, sequences.tokens_BS.device
    own_T = (whole.owner_T == rank).nonzero()[:, 0]
    row_T, position_T = whole.row_T[own_T], whole.position_T[own_T]
    read_N = read_BS[row_T, position_T].nonzero()[:, 0]
    places_N = order_BS[row_T[read_N], position_T[read_N]]
    tokens_T = sequences.tokens_BS[row_T.to(device), position_T.to(device)]
    begins_T = position_T == 0
    begins_T[1:] |= own_T.diff() > 1
    begins_T[:1] = True
    ends = [*begins_T.nonzero()[:, 0].tolist(), len(own_T)]
    lengths = [stop - start for start, stop in zip(ends, ends[1:], strict=False)]
    keys = None
    if ranks > 1:
        keys = keys_of(whole.owner_T, rank, own_T, position_T, lengths, width).to(device)
    if (missing := width - len(own_T)) > 0:
        tokens_T = torch.cat([tokens_T, tokens_T.new_zeros(missing)])
        position_T = torch.cat([position_T, torch.arange(missing)])
        lengths.append(missing)
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    return Pack(
        tokens_T[None], position_T.to(device), tuple(lengths), offsets, read_N.to(device), places_N.to(device), keys
    )
