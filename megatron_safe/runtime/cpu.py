"""What it takes to run Megatron-Core 0.16.1 on a CPU with gloo. No other file knows.

Megatron-Core asks for `device="cuda"` in the pipeline schedules, the optimizers, gradient clipping and RoPE, and for
`torch.cuda.current_device()` wherever it allocates a receive buffer. `answer_cuda_with_cpu` answers all of these with
the CPU. A global `TorchFunctionMode` would do the same in fewer lines but taxes every torch call (about 20% of a tiny
step), so the factories are wrapped one by one.
"""

import functools

import torch

_FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full", "full_like", "linspace", "ones",
    "ones_like", "rand", "randint", "randn", "tensor", "zeros", "zeros_like",
)  # fmt: skip


def _is_cuda(device) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _on_cpu(factory):
    @functools.wraps(factory)
    def wrapped(*args, **kwargs):
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = "cpu"
            kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return wrapped


def answer_cuda_with_cpu() -> None:
    """Patch torch and Megatron-Core in this process, once. Only for machines without CUDA.

    Raises:
        RuntimeError: CUDA is available; patching would hide the GPU from everything else in the process.
    """
    if torch.cuda.is_available():
        raise RuntimeError("answer_cuda_with_cpu() is for machines without CUDA")
    if getattr(torch.zeros, "__wrapped__", None) is not None:
        return

    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))

    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.empty_cache = lambda: None
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    torch.Tensor.cuda = lambda self, *args, **kwargs: self

    plain_type = torch.Tensor.type

    def tensor_type(self, dtype=None, **kwargs):
        # The optimizers assert on the name 'torch.cuda.FloatTensor'.
        if dtype is not None:
            return plain_type(self, dtype, **kwargs)
        return plain_type(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = tensor_type

    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda new_state, *args, **kwargs: torch.set_rng_state(new_state)
