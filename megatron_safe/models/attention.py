"""Core attention over packed sequences: each token sees itself and what comes before it in its own sequence.

Legend: T tokens of a pack, N of them read, n sequences of l tokens, H query heads and G key/value heads on this rank,
D head size.
"""

from dataclasses import dataclass
from functools import cache

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_safe.models.context_parallel import gather_keys
from megatron_safe.models.packing import Pack
from megatron_safe.models.rope import rotate


def causal_attention(query_nlHD, key_nkGD, value_nkGD, window: int | None = None) -> torch.Tensor:
    """[n, l, H, D] of the last l tokens of n sequences of one length k.

    window: a token sees itself and this many before it (None: all).
    """
    length, keys, mask = query_nlHD.size(1), key_nkGD.size(1), None
    window = keys if window is None else window
    if length < keys or window < keys - 1:
        positions = torch.arange(keys, device=query_nlHD.device)
        distance = positions[keys - length :, None] - positions
        mask = (distance >= 0) & (distance <= window)
    context_nHlD = torch.nn.functional.scaled_dot_product_attention(
        query_nlHD.transpose(1, 2),
        key_nkGD.transpose(1, 2),
        value_nkGD.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=query_nlHD.size(2) != key_nkGD.size(2),
    )
    return context_nHlD.transpose(1, 2)


def packed_attention(query_THD, key_TGD, value_TGD, pack: Pack, window: int | None = None) -> torch.Tensor:
    """[T, H, D]: every sequence of the pack by itself; of a dealt pack every piece, with keys of all ranks.

    Half precision on a GPU takes one variable-length flash kernel; anything else one call for each run of sequences of
    equal length.
    """
    key_offsets = pack.offsets
    if pack.keys is not None:
        key_TGD, value_TGD = gather_keys(key_TGD, value_TGD, pack.keys)
        key_offsets = pack.keys.offsets
    if query_THD.is_cuda and query_THD.dtype != torch.float32 and (varlen := _varlen_kernel()):
        return varlen(query_THD, key_TGD, value_TGD, pack.offsets, key_offsets, max(pack.lengths), pack.longest, window)
    runs = list(pack.runs())
    queries = query_THD.split([count * length for count, length, _ in runs])
    keys, values = (x.split([count * length for count, _, length in runs]) for x in (key_TGD, value_TGD))
    contexts = [
        causal_attention(*(x.unflatten(0, (count, -1)) for x in tensors), window).flatten(0, 1)
        for (count, _, _), *tensors in zip(runs, queries, keys, values, strict=True)
    ]
    return contexts[0] if len(contexts) == 1 else torch.cat(contexts)


@cache
def _varlen_kernel():
    """PyTorch's variable-length attention, or flash-attn's where PyTorch is too old to have one. Both align a piece's
    last query with its last key."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        try:
            from flash_attn import flash_attn_varlen_func
        except ImportError:
            return None

        def attend(query_THD, key_TGD, value_TGD, offsets, key_offsets, longest, most_keys, window: int | None):
            return flash_attn_varlen_func(
                query_THD, key_TGD, value_TGD, offsets, key_offsets, longest, most_keys,
                causal=True, window_size=(-1 if window is None else window, 0),
            )  # fmt: skip

        return attend

    def attend(query_THD, key_TGD, value_TGD, offsets, key_offsets, longest, most_keys, window: int | None):
        return varlen_attn(
            query_THD, key_TGD, value_TGD, offsets, key_offsets, longest, most_keys,
            window_size=(-1 if window is None else window, 0), enable_gqa=query_THD.size(1) != key_TGD.size(1),
        )  # fmt: skip

    return attend


def window_of(config: TransformerConfig) -> int | None:
    """How many tokens before itself a token sees; None: all."""
    return None if config.window_size is None else config.window_size[0]


@dataclass(frozen=True)
class Packed:
    """What goes to every layer as Megatron-Core's `packed_seq_params`: a pack, and the turn of each of its tokens."""

    pack: Pack
    cos_T1D: torch.Tensor
    sin_T1D: torch.Tensor
    qkv_format: str = "packed"  # with "thd" Megatron-Core would drop a dimension


def narrows(config: TransformerConfig, layer_number: int) -> bool:
    """Whether a layer goes on with the rows that are read: the last one of a model, while it has all rows."""
    return layer_number == config.num_layers and not config.sequence_parallel


class PackedCoreAttention(MegatronModule):
    """Megatron-Core's core-attention module: rotates queries and keys, and attends within each sequence.

    RoPE is here, not where Megatron-Core has it, because one pack's cosines and sines serve all layers.
    """

    def __init__(self, config, layer_number, attn_mask_type, attention_type, **_):
        super().__init__(config=config)
        self.narrows = narrows(config, layer_number)

    def forward(self, query, key, value, attention_mask=None, *, packed_seq_params: Packed, **_):
        """query [T, 1, H, D], key and value [T, 1, G, D] -> [T, 1, H * D], or [N, 1, H * D] where it narrows."""
        packed = packed_seq_params
        query_THD, key_TGD = (rotate(x.squeeze(1), packed.cos_T1D, packed.sin_T1D) for x in (query, key))
        context = packed_attention(query_THD, key_TGD, value.squeeze(1), packed.pack, window_of(self.config))
        if self.narrows:
            context = context.index_select(0, packed.pack.read_N)
        return context.flatten(1).unsqueeze(1)


class Layer(TransformerLayer):
    """Megatron-Core's layer, which may go on with the rows that are read."""

    def _forward_attention(self, hidden_states, *args, packed_seq_params: Packed, **kwargs):
        if not narrows(self.config, self.layer_number):
            return super()._forward_attention(hidden_states, *args, packed_seq_params=packed_seq_params, **kwargs)
        attended, _ = self.self_attention(
            self.input_layernorm(hidden_states), attention_mask=None, packed_seq_params=packed_seq_params
        )
        return hidden_states.index_select(0, packed_seq_params.pack.read_N) + attended, None
