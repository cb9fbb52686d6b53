"""Rotary position embeddings (Su et al., 2021), stretched for longer sequences as published models do it (Llama 3.1).

Legend: T tokens, H heads, D head size.
"""

import math

import torch

from megatron_safe.config import ModelConfig


def rope_frequencies(model: ModelConfig) -> torch.Tensor:
    """[D / 2] fp32 radians a position: base^(-2i / D), of a head of size D.

    `linear` divides all of them by the factor. `llama3` leaves wavelengths below original / high_freq_factor alone,
    divides those above original / low_freq_factor by the factor, and goes over from the one to the other linearly in
    original / wavelength between them.
    """
    size = head_dim(model)
    frequencies = 1.0 / model.rotary_base ** (torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size)
    if model.rope_type == "default":
        return frequencies
    stretched = frequencies / model.rope_factor
    if model.rope_type == "linear":
        return stretched
    low, high = model.rope_low_freq_factor, model.rope_high_freq_factor
    turns = model.rope_original_max_position * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - kept) * stretched + kept * frequencies


def head_dim(model: ModelConfig) -> int:
    return model.head_dim or model.hidden_size // model.num_attention_heads


def rotation(positions_T: torch.Tensor, longest: int, frequencies: torch.Tensor, dtype: torch.dtype):
    """Cosines and sines [T, 1, D] of positions below `longest`, for `rotate`: the sines of a head's first half are
    negative."""
    steps = torch.arange(longest, dtype=torch.float32, device=positions_T.device)
    angles = torch.outer(steps, frequencies)
    cos, sin = angles.cos(), angles.sin()
    cos_T1D, sin_T1D = torch.cat([cos, cos], dim=1), torch.cat([-sin, sin], dim=1)
    return cos_T1D.to(dtype)[positions_T][:, None], sin_T1D.to(dtype)[positions_T][:, None]


class _Rotate(torch.autograd.Function):
    """A rotation's transpose turns the other way, so backward needs nothing of x."""

    @staticmethod
    def forward(ctx, x_THD, cos_T1D, sin_T1D):
        ctx.save_for_backward(cos_T1D, sin_T1D)
        return (x_THD * cos_T1D).addcmul_(x_THD.roll(x_THD.size(-1) // 2, -1), sin_T1D)

    @staticmethod
    def backward(ctx, slope_THD):
        cos_T1D, sin_T1D = ctx.saved_tensors
        turned_THD = slope_THD.roll(slope_THD.size(-1) // 2, -1)
        return (slope_THD * cos_T1D).addcmul_(turned_THD, sin_T1D, value=-1), None, None


def rotate(x_THD: torch.Tensor, cos_T1D: torch.Tensor, sin_T1D: torch.Tensor) -> torch.Tensor:
    """Queries or keys, turned by their positions."""
    return _Rotate.apply(x_THD, cos_T1D, sin_T1D)
