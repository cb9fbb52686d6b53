"""RMSNorm and its analytic gradient against the formula in float64."""

from types import SimpleNamespace

import pytest
import torch

from megatron_safe.models.norm import RMSNorm

EPS = 1e-2  # large enough that a mistake in it would show


def made(size: int, dtype: torch.dtype) -> RMSNorm:
    norm = RMSNorm(SimpleNamespace(sequence_parallel=True), size, EPS).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(size))
    return norm


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", [(7, 12), (3, 1, 4, 6), (0, 1, 5), (1, 1)])
def test_it_and_its_gradients_are_the_formulas(shape, dtype, tolerance):
    torch.manual_seed(sum(shape))
    norm = made(shape[-1], dtype)
    x = torch.randn(shape).to(dtype).requires_grad_()
    slope = torch.randn(shape).to(dtype)
    y = norm(x)
    y.backward(slope)
    wide, weight = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    expected = wide / torch.sqrt((wide**2).mean(dim=-1, keepdim=True) + EPS) * weight
    expected.backward(slope.double())
    for found, wanted in ((y, expected), (x.grad, wide.grad), (norm.weight.grad, weight.grad)):
        assert found.dtype == dtype
        torch.testing.assert_close(found.detach().double(), wanted.detach(), rtol=tolerance, atol=4 * tolerance)


def test_its_weight_is_marked_for_the_reduction_over_tokens():
    assert made(4, torch.float32).weight.sequence_parallel
    assert not RMSNorm(SimpleNamespace(sequence_parallel=False), 4).weight.sequence_parallel
