"""Which implementation of a kernel runs: Triton or vectorised PyTorch; and Triton itself, where it is installed.

Kernel files write `from .backend import tl, triton`: where triton is missing they still import, and the Triton path is
never taken.
"""

from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    # Just enough to define the kernels that nothing will launch.
    triton = SimpleNamespace(jit=lambda function: function)
    tl = SimpleNamespace(constexpr=None)

BACKENDS = ("auto", "triton", "torch")
_backend = "auto"


def set_backend(backend: str) -> None:
    """Choose for the whole process: "auto" (Triton for CUDA tensors, PyTorch for others), "triton" or "torch".

    "triton" is for CUDA; on CPU it needs Triton's interpreter, which is for tests: TRITON_INTERPRET=1 in the
    environment before triton is imported.

    Raises ValueError for another name, RuntimeError if "triton" is asked for and not installed.
    """
    global _backend
    if backend not in BACKENDS:
        raise ValueError(f"kernel backend must be one of {', '.join(BACKENDS)}, found {backend!r}")
    if backend == "triton" and not _installed():
        raise RuntimeError("kernel backend 'triton': triton is not installed here")
    _backend = backend


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether the Triton kernel runs for a tensor on this device. "auto" without triton takes PyTorch, also on CUDA.

    Raises RuntimeError for "triton" on a CPU tensor without the interpreter.
    """
    if _backend == "torch" or (_backend == "auto" and not (tensor.is_cuda and _installed())):
        return False
    if not tensor.is_cuda and not interpreted():
        raise RuntimeError(
            f"kernel backend 'triton': the tensors are on {tensor.device.type}, which only Triton's interpreter "
            "serves; set TRITON_INTERPRET=1 before triton is imported"
        )
    return True


def interpreted() -> bool:
    """Whether the kernels were defined for Triton's interpreter (slow, any device) instead of its compiler."""
    # Asked of a kernel, not of the environment: a variable that was set after the import changes nothing.
    return _installed() and not isinstance(_probe, triton.JITFunction)


def _installed() -> bool:
    return hasattr(triton, "JITFunction")


@triton.jit
def _probe():
    pass
