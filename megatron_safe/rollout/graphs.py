"""Ticks without prompts as CUDA graphs: a small step costs a GPU less than telling it what to do.

Legend: C samples, E >= C rows of a graph, h hidden size, v this rank's vocabulary shard.
"""

import torch

from megatron_safe.rollout.cache import SlotCache
from megatron_safe.rollout.decoder import Decoder
from megatron_safe.rollout.slots import Tick


class _Graph:
    def __init__(self, decoder: Decoder, cache: SlotCache, rows: int, given: torch.Tensor):
        self._decoder, self._cache = decoder, cache
        self.given = torch.zeros((rows, *given.shape[1:]), dtype=given.dtype, device=given.device)
        slots_E = torch.arange(rows, device=given.device)
        self.positions_E = torch.zeros_like(slots_E)
        self._tick = Tick(
            tokens_R=self.given,
            positions_R=self.positions_E,
            places_C=slots_E,  # only their number counts
            ends_C=slots_E,
            longest=cache.most_positions - 1,
            prompts=[],
            slots_W=slots_E,
            positions_W=self.positions_E,
            rows_W=None,
        )
        self._graph: torch.cuda.CUDAGraph | None = None

    def run(self) -> torch.Tensor:
        if self._graph is None:
            # Once without: it compiles kernels and opens connections, which no graph can hold. What it writes into the
            # cache is what the graph will write there again.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._stage()
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._result = self._stage()
        self._graph.replay()
        return self._result

    def _stage(self) -> torch.Tensor:
        # A clone: hidden states are overwritten.
        return self._decoder.stage(self.given.clone(), self._tick, self._cache)


class DecodeGraphs:
    """`Decoder.stage` on one cache, captured once for each power of two of samples.

    What a tick's number of samples leaves of a graph's rows is slots that nobody has: their first cell is written, and
    what is made of it is thrown away.
    """

    def __init__(self, decoder: Decoder, cache: SlotCache, slots: int):
        self._decoder, self._cache, self._slots = decoder, cache, slots
        self._graphs: dict[int, _Graph] = {}

    def run(self, given: torch.Tensor, tick: Tick) -> torch.Tensor:
        """What `Decoder.stage` gives. Logits are the graph's own memory, good until its next run."""
        count = tick.samples
        rows = min(self._slots, 1 << (count - 1).bit_length())
        if rows not in self._graphs:
            self._graphs[rows] = _Graph(self._decoder, self._cache, rows, given)
        graph = self._graphs[rows]
        graph.given[:count] = given
        graph.positions_E[:count] = tick.positions_R
        graph.positions_E[count:] = 0
        result = graph.run()[:count]
        # A send may be under way when the graph runs again.
        return result if self._decoder.is_last else result.clone()
