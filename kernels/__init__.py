"""Fused operations of Safe RLHF, one per file; imports torch and triton only. Installed as `megatron_safe.kernels`."""
