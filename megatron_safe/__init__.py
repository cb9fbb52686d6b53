"""Safe RLHF (Dai et al., 2023) at Megatron scale."""

__version__ = "0.1.0"
