"""Keys and values of a batch while it is decoded.

Legend: S new positions, B samples, H query heads and G key/value heads on this rank, D head size, K cache slots.
"""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_safe.models.attention import causal_attention, window_of


class KVCache:
    """An `AttentionCache` with one row of slots per sample and a position of its own for each.

    Prompts are right-padded: slot i of a row holds position i of that sample, and a generated token overwrites the
    padding behind its prompt. Keys are stored already rotated, so a step touches only the new position.
    """

    def __init__(self, config: TransformerConfig, layers: range, batch: int, slots: int, device: torch.device):
        """Allocate for the 1-based global layer numbers `layers`: 2 * len(layers) * B * G * K * D elements."""
        groups = config.num_query_groups // config.tensor_model_parallel_size
        shape = (batch, groups, slots, config.kv_channels)
        self._first_layer = layers.start
        self._keys = [torch.zeros(shape, dtype=config.params_dtype, device=device) for _ in layers]
        self._values = [torch.zeros(shape, dtype=config.params_dtype, device=device) for _ in layers]
        self._rows = torch.arange(batch, device=device)
        self._positions_B: torch.Tensor | None = None
        self._visible = 0
        self._mask: torch.Tensor | None = None
        self._window = window_of(config)

    def start_step(self, positions_B: torch.Tensor, longest: int) -> None:
        """The next forward decodes one token per sample at `positions_B`; `longest` is at least their maximum."""
        self._positions_B = positions_B
        self._visible = longest + 1
        slots = torch.arange(self._visible, device=positions_B.device)
        mask_BK = slots <= positions_B[:, None]
        if self._window is not None:
            mask_BK &= slots >= positions_B[:, None] - self._window
        self._mask = mask_BK[:, None, None, :]

    def attend(self, layer_number: int, query_SBHD, key_SBGD, value_SBGD) -> torch.Tensor:
        keys_BGKD = self._keys[layer_number - self._first_layer]
        values_BGKD = self._values[layer_number - self._first_layer]
        if self._positions_B is None:  # prefill
            length = key_SBGD.size(0)
            keys_BGKD[:, :, :length] = key_SBGD.permute(1, 2, 0, 3)
            values_BGKD[:, :, :length] = value_SBGD.permute(1, 2, 0, 3)
            return causal_attention(query_SBHD, key_SBGD, value_SBGD, self._window)
        keys_BGKD[self._rows, :, self._positions_B] = key_SBGD[0]
        values_BGKD[self._rows, :, self._positions_B] = value_SBGD[0]
        context_BHSD = torch.nn.functional.scaled_dot_product_attention(
            query_SBHD.permute(1, 2, 0, 3),
            keys_BGKD[:, :, : self._visible],
            values_BGKD[:, :, : self._visible],
            attn_mask=self._mask,
            enable_gqa=query_SBHD.size(2) != key_SBGD.size(2),
        )
        return context_BHSD.permute(2, 0, 1, 3)
