import subprocess
import sys

import pytest
import torch

from megatron_safe.kernels.backend import interpreted, set_backend, use_triton


@pytest.fixture(autouse=True)
def restored():
    yield
    set_backend("auto")


class OnCuda:
    is_cuda = True
    device = torch.device("cuda")


def test_auto_follows_the_device():
    set_backend("auto")
    assert not use_triton(torch.zeros(1))
    assert use_triton(OnCuda())


def test_torch_everywhere():
    set_backend("torch")
    assert not use_triton(torch.zeros(1)) and not use_triton(OnCuda())


@pytest.mark.skipif(torch.cuda.is_available(), reason="no interpreter where there is a GPU")
def test_triton_on_a_cpu_in_the_interpreter():
    assert interpreted(), "this folder's tests need TRITON_INTERPRET=1 before triton is imported"
    set_backend("triton")
    assert use_triton(torch.zeros(1)) and use_triton(OnCuda())


def test_unknown_name():
    with pytest.raises(ValueError, match="auto, triton, torch, found 'cuda'"):
        set_backend("cuda")


def in_a_new_process(program: str, **environment) -> str:
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_without_the_interpreter_triton_refuses_a_cpu_and_names_the_remedy():
    said = in_a_new_process(
        "import torch; from megatron_safe.kernels.backend import *\n"
        "import os; os.environ['TRITON_INTERPRET'] = '1'\n"  # too late
        "set_backend('triton')\n"
        "try: use_triton(torch.zeros(1))\n"
        "except RuntimeError as error: print(error)"
    )
    assert "TRITON_INTERPRET=1" in said


def test_without_triton_everything_imports_and_runs():
    said = in_a_new_process(
        "import sys; sys.modules['triton'] = None\n"  # import triton raises ImportError
        "import importlib, pathlib, torch, megatron_safe.kernels as kernels\n"
        "for path in pathlib.Path(kernels.__path__[0]).glob('*.py'):\n"
        "    importlib.import_module('megatron_safe.kernels.' + path.stem)\n"
        "from megatron_safe.kernels.backend import set_backend, use_triton\n"
        "from megatron_safe.kernels.value_loss import value_loss\n"
        "one = torch.ones(1, 1)\n"
        "class OnCuda: is_cuda = True\n"
        "print(use_triton(OnCuda()), value_loss(3 * one, one, one, one, 9.0).item())\n"
        "try: set_backend('triton')\n"
        "except RuntimeError as error: print(error)"
    )
    assert said.splitlines() == ["False 2.0", "kernel backend 'triton': triton is not installed here"]
