"""Fused operations of Safe RLHF, one per file; imports torch only. Installed as `megatron_safe.kernels`."""
