"""What Megatron-Core asks of CUDA, answered by a CPU."""

import pytest
import torch

from megatron_safe.runtime import cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="patches torch, for machines without CUDA only")


@pytest.fixture(autouse=True, scope="module")
def answers():
    cpu.answer_cuda_with_cpu()


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 1)])
@pytest.mark.parametrize(
    "make",
    [
        lambda **k: torch.zeros(2, 3, **k),
        lambda **k: torch.empty(2, **k),
        lambda **k: torch.full((2,), 7.0, **k),
        lambda **k: torch.tensor([1.0, 2.0], **k),
        lambda **k: torch.as_tensor([1.0, 2.0], **k),
        lambda **k: torch.arange(5, **k),
        lambda **k: torch.ones_like(torch.zeros(3), **k),
        lambda **k: torch.rand(3, **k),
        lambda **k: torch.randint(0, 5, (3,), **k),
        lambda **k: torch.linspace(0, 1, 5, **k),
    ],
)
def test_factories_make_cpu_tensors(make, device):
    assert make(device=device).device.type == "cpu"


def test_values_are_those_asked_for():
    assert torch.full((2,), 7.0, device="cuda").tolist() == [7.0, 7.0]
    assert torch.arange(3, device="cuda").tolist() == [0, 1, 2]
    assert torch.tensor([1, 2], dtype=torch.int8, device="cuda").dtype == torch.int8
    assert torch.zeros(2, device="meta").device.type == "meta"  # any other device is left alone
    assert torch.empty(2, device="cpu", pin_memory=True).is_pinned() is False


def test_what_is_asked_of_cuda_itself():
    assert torch.cuda.current_device() == "cpu"
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    x = torch.ones(2)
    assert x.cuda() is x
    assert x.type() == "torch.cuda.FloatTensor" and x.bfloat16().type() == "torch.cuda.BFloat16Tensor"
    assert x.type(torch.int32).dtype == torch.int32
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


def test_patching_twice_wraps_once():
    zeros = torch.zeros
    cpu.answer_cuda_with_cpu()
    assert torch.zeros is zeros and not hasattr(zeros.__wrapped__, "__wrapped__")


def test_a_gpu_is_never_hidden(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="for machines without CUDA"):
        cpu.answer_cuda_with_cpu()
