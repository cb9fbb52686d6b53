import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_safe.kernels.value_loss import value_loss


def make(shape, seed=0, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    values, old_values, returns = (torch.randn(shape, generator=generator).to(dtype).to(device) for _ in range(3))
    weights = torch.rand(shape, generator=generator).to(device)
    weights[torch.rand(shape, generator=generator).to(device) < 0.3] = 0.0
    return values, old_values, returns, weights


def reference(values, old_values, returns, weights, clip):
    """(loss, gradients as a flat list) of the formula, by Python floats; the gradient case by case."""
    losses, gradients = [], []
    for v, old, target, w in zip(*(x.double().flatten().tolist() for x in (values, old_values, returns, weights)),
                                 strict=True):  # fmt: skip
        if w == 0:
            losses.append(0.0)
            gradients.append(0.0)
            continue
        low, high = old - clip, old + clip
        plain, clipped = (v - target) ** 2, (min(max(v, low), high) - target) ** 2
        losses.append(w * 0.5 * max(plain, clipped))
        gradients.append(0.0 if clipped > plain else w * (v - target))
    return math.fsum(losses), gradients


def run(inputs, clip, scale=1.0):
    values = inputs[0].detach().clone().requires_grad_()
    loss = value_loss(values, *inputs[1:], clip)
    (loss * scale).backward()
    return loss.detach(), values.grad


def check(inputs, clip, scale=1.0, rtol=1e-5):
    loss, gradient = run(inputs, clip, scale)
    expected_loss, expected_gradients = reference(*inputs, clip)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert gradient.dtype == inputs[0].dtype and gradient.shape == inputs[0].shape
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5, abs=1e-6)
    expected = scale * torch.tensor(expected_gradients, dtype=torch.float64).reshape(inputs[0].shape)
    torch.testing.assert_close(gradient.cpu().double(), expected, atol=1e-6, rtol=rtol)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (1, 2047), (2, 1024), (3, 1367)])
def test_equals_the_formula(device, shape):
    check(make(shape, device=device), 0.4, scale=-2.5)


@pytest.mark.parametrize("clip", [0.0, 1e-3, 1e6])
def test_any_clip(device, clip):
    check(make((4, 33), seed=1, device=device), clip)


@pytest.mark.parametrize("dtype, rtol", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_gradient_of_halves_is_rounded_once(device, dtype, rtol):
    check(make((4, 33), seed=2, device=device, dtype=dtype), 0.2, rtol=rtol)


def test_small_weights_survive_a_scaled_half_gradient(device):
    # 1 / (tokens of a large batch) would underflow in fp16 before the loss scale could lift it.
    values, old, returns, weights = make((2, 9), seed=3, device=device, dtype=torch.float16)
    check((values, old, returns, weights * 1e-8), 0.2, scale=2.0**16, rtol=2**-10)


def test_equals_autograd_of_the_formula(device):
    values, old, returns, weights = make((3, 50), seed=4, device=device)
    _, gradient = run((values, old, returns, weights), 0.3)
    leaf = values.double().requires_grad_()
    clipped = leaf.clamp(old.double() - 0.3, old.double() + 0.3)
    squares = torch.maximum((leaf - returns).square(), (clipped - returns).square())
    (0.5 * weights * squares).sum().backward()
    torch.testing.assert_close(gradient.double(), leaf.grad, atol=1e-6, rtol=1e-5)


def test_what_does_not_count_is_not_looked_at(device):
    values, old, returns, weights = make((4, 20), seed=5, device=device)
    loss, gradient = run((values, old, returns, weights), 0.3)
    hidden = weights == 0
    assert hidden.any()
    junk = [x.masked_fill(hidden, bad) for x, bad in ((values, math.nan), (old, math.inf), (returns, -math.inf))]
    junk_loss, junk_gradient = run((*junk, weights), 0.3)
    assert torch.equal(junk_loss, loss) and torch.equal(junk_gradient, gradient)


def test_a_nan_that_counts_shows(device):
    values, old, returns, weights = make((2, 3), seed=6, device=device)
    weights.fill_(0.5)
    values[1, 2] = math.nan
    loss, gradient = run((values, old, returns, weights), 0.3)
    assert loss.isnan() and gradient.isnan().sum() == 1 and gradient[1, 2].isnan()


@pytest.mark.parametrize("shape", [(3, 5), (0, 5), (2, 0)])
def test_nothing_counts(device, shape):
    values, old, returns, weights = make(shape, device=device)
    loss, gradient = run((values, old, returns, torch.zeros_like(weights)), 0.3)
    assert loss == 0 and (gradient == 0).all() and gradient.shape == shape


def test_strided_inputs(device):
    plain = make((6, 10), seed=7, device=device)
    strided = [x.t().contiguous().t() for x in plain]
    for one, other in zip(run(plain, 0.3), run(strided, 0.3), strict=True):
        assert torch.equal(one, other)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 9), columns=st.integers(1, 40), seed=st.integers(0, 999), clip=st.floats(0, 3))
def test_any_shape_and_twice_the_same_bits(device, rows, columns, seed, clip):
    inputs = make((rows, columns), seed, device=device)
    check(inputs, clip)
    for one, other in zip(run(inputs, clip), run(inputs, clip), strict=True):
        assert torch.equal(one, other)


def test_shapes_that_differ():
    values, old, returns, weights = make((2, 3))
    with pytest.raises(ValueError, match="one shape"):
        value_loss(values, old, returns, weights[0], 0.2)
