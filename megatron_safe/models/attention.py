"""Core attention through PyTorch's scaled_dot_product_attention, with room for a key/value cache.

Legend: S sequence, B batch, H query heads and G key/value heads on this rank, D head size.
"""

from typing import Protocol

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig


class AttentionCache(Protocol):
    """What a rollout passes in place of `attention_mask` to attend over keys and values it keeps."""

    def attend(self, layer_number: int, query_SBHD, key_SBGD, value_SBGD) -> torch.Tensor:
        """Store the new keys (already rotated) and values of this layer; return the context [S, B, H, D]."""


def causal_attention(query_SBHD, key_SBGD, value_SBGD, window: int | None = None) -> torch.Tensor:
    """[S, B, H, D]. Right-padded batches need no mask: what comes after a token cannot reach it.

    window: a token sees itself and this many before it (None: all).
    """
    length, mask = query_SBHD.size(0), None
    if window is not None and window < length - 1:
        positions = torch.arange(length, device=query_SBHD.device)
        distance = positions[:, None] - positions
        mask = (distance >= 0) & (distance <= window)
    context_BHSD = torch.nn.functional.scaled_dot_product_attention(
        query_SBHD.permute(1, 2, 0, 3),
        key_SBGD.permute(1, 2, 0, 3),
        value_SBGD.permute(1, 2, 0, 3),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=query_SBHD.size(2) != key_SBGD.size(2),
    )
    return context_BHSD.permute(2, 0, 1, 3)


def window_of(config: TransformerConfig) -> int | None:
    """How many tokens before itself a token sees; None: all."""
    return None if config.window_size is None else config.window_size[0]


class SDPACoreAttention(MegatronModule):
    """Megatron-Core's core-attention module: causal, or over an `AttentionCache`."""

    def __init__(self, config, layer_number, attn_mask_type, attention_type, **_):
        super().__init__(config=config)
        self.layer_number = layer_number

    def forward(self, query, key, value, attention_mask, attn_mask_type=None, attention_bias=None, **_):
        """query [S, B, H, D], key and value [S, B, G, D] -> [S, B, H * D]."""
        if attention_mask is None:
            context = causal_attention(query, key, value, window_of(self.config))
        else:
            context = attention_mask.attend(self.layer_number, query, key, value)
        return context.reshape(*context.shape[:2], -1)
