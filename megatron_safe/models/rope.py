"""RoPE's frequencies, stretched for longer sequences as published models do it (Su et al., 2021; Llama 3.1)."""

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
