"""Keys and values of the samples that are being decoded.

Legend: Y layers of this stage, C slots, G key/value heads on this rank, K positions of a slot, D head size, W cells to
write in each layer and head.
"""

import math

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

STEP = 32
"""Positions by which slots grow."""


class SlotCache:
    """One slot per sample, position p of the sample in its cell p: a key, already rotated, and its value.

    On a CPU slots are as long as the longest sample needs and grow with it, because attention reads whole slots: a
    product over the first half of each runs through memory at a third of the speed. On a GPU they have their full
    length from the start.

    What a slot held before needs no clearing: a sample sees only cells up to its own position, all of which it wrote.
    """

    def __init__(self, config: TransformerConfig, layers: int, slots: int, positions: int, device: torch.device):
        """positions: as many as any sample may have. At most 2 * layers * slots * G * positions * D elements."""
        self._groups = config.num_query_groups // config.tensor_model_parallel_size
        self._size, self._slots = config.kv_channels, slots
        self.most_positions, self.positions = positions, 0
        cells, options = slots * self._groups * positions, dict(dtype=config.params_dtype, device=device)
        # Memory that nobody has touched costs a CPU nothing yet.
        self._memory = [torch.empty(cells * self._size, **options) for _ in range(2 * layers)]
        self.reserve(positions if device.type != "cpu" else min(positions, STEP))

    @staticmethod
    def bytes_per_slot(config: TransformerConfig, layers: int, positions: int) -> int:
        groups = config.num_query_groups // config.tensor_model_parallel_size
        return 2 * layers * groups * positions * config.kv_channels * config.params_dtype.itemsize

    def reserve(self, positions: int) -> None:
        """Grow to at least so many positions."""
        before, kept = self.positions, None
        if positions <= before:
            return
        self.positions = min(self.most_positions, -(-positions // STEP) * STEP)
        views = []
        for memory in self._memory:
            if before:  # by way of memory that is used for each layer again: new one costs more than copying
                kept = self._view(memory, before).clone() if kept is None else kept.copy_(self._view(memory, before))
            views.append(self._view(memory, self.positions))
            if before:
                views[-1][:, :, :before] = kept
            # A weight of 0 does not hide a NaN that memory may hold.
            views[-1][:, :, before:] = 0
        layers = len(views) // 2
        self._keys, self._values = views[:layers], views[layers:]

    def _view(self, memory: torch.Tensor, positions: int) -> torch.Tensor:
        shape = self._slots, self._groups, positions, self._size
        return memory[: math.prod(shape)].view(shape)

    def cells(self, slots_W: torch.Tensor, positions_W: torch.Tensor) -> torch.Tensor:
        """[W * G]: what `write` calls the cells of these slots and positions, head by head; until slots grow."""
        heads_WG = slots_W[:, None] * self._groups + torch.arange(self._groups, device=slots_W.device)
        return (heads_WG * self.positions + positions_W[:, None]).flatten()

    def write(self, layer: int, cells: torch.Tensor, keys_ZD: torch.Tensor, values_ZD: torch.Tensor) -> None:
        """cells [Z]: of `cells`."""
        self._keys[layer].flatten(0, 2).index_copy_(0, cells, keys_ZD)
        self._values[layer].flatten(0, 2).index_copy_(0, cells, values_ZD)

    def read(self, layer: int, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the first slots: keys and values, [slots, G, positions, D] each."""
        return self._keys[layer][:slots], self._values[layer][:slots]

    def copy(self, source: int, target: int, positions: int) -> None:
        for cells_CGKD in self._keys + self._values:
            cells_CGKD[target, :, :positions] = cells_CGKD[source, :, :positions]
