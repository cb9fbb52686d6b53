"""The one process group: torch.distributed, Megatron's parallel state, device and seeds."""

from megatron_safe.runtime.process_group import Runtime, start

__all__ = ["Runtime", "start"]
