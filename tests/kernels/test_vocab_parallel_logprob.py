"""Log-probability, entropy and their gradients against float64 formulas, on 1, 2 and 4 shards.

Legend: N tokens, V vocabulary, V/p of it on a shard (`logits_Nv`).
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_safe.kernels import vocab_parallel_logprob as module
from megatron_safe.kernels.backend import set_backend
from megatron_safe.kernels.vocab_parallel_logprob import vocab_parallel_logprob

EPS = torch.finfo(torch.float32).eps

# numpy, under Triton's interpreter, of finfo.min / temperature.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


def reference(logits_NV, targets_N, temperature, weights_N, entropy_weights_N):
    """Log-probs, entropies, and d(Σ w log p + Σ u H)/d logits, in float64 from the formulas."""
    z_NV = logits_NV.double() / temperature
    log_p_NV = torch.log_softmax(z_NV, dim=1)
    p_NV = log_p_NV.exp()
    entropy_N = torch.tensor(
        [-math.fsum(p * lp for p, lp in zip(ps, lps, strict=True) if p > 0)
         for ps, lps in zip(p_NV.tolist(), log_p_NV.tolist(), strict=True)],
        dtype=torch.float64,
    )  # fmt: skip
    one_hot_NV = torch.nn.functional.one_hot(targets_N, z_NV.size(1))
    gradient_NV = weights_N[:, None].double() * (one_hot_NV - p_NV)
    surprise_NV = torch.where(p_NV > 0, p_NV * (log_p_NV + entropy_N[:, None]), 0.0)
    gradient_NV = (gradient_NV - entropy_weights_N[:, None].double() * surprise_NV) / temperature
    return log_p_NV.gather(1, targets_N[:, None])[:, 0], entropy_N, gradient_NV


def kernel(on_shards, shards, logits_NV, targets_N, temperature, weights_N, entropy_weights_N):
    """The same from the kernel; what it says on each rank must be the same."""
    width = logits_NV.size(1) // max(1, shards)

    def on_rank(rank, group):
        shard_Nv = logits_NV[:, rank * width : (rank + 1) * width].clone().requires_grad_()
        log_probs_N, entropy_N = vocab_parallel_logprob(shard_Nv, targets_N, temperature, group)
        (log_probs_N * weights_N + entropy_N * entropy_weights_N).sum().backward()
        assert shard_Nv.grad.dtype == logits_NV.dtype
        return log_probs_N.detach(), entropy_N.detach(), shard_Nv.grad

    results = on_shards(shards, on_rank) if shards else [on_rank(0, None)]  # 0: no group at all
    log_probs_N, entropy_N, _ = results[0]
    assert log_probs_N.dtype == entropy_N.dtype == torch.float32
    for other_log_probs_N, other_entropy_N, _ in results[1:]:
        assert torch.equal(log_probs_N, other_log_probs_N) and torch.equal(entropy_N, other_entropy_N)
    return log_probs_N, entropy_N, torch.cat([gradient_Nv for *_, gradient_Nv in results], dim=1)


def compare(on_shards, shards, logits_NV, targets_N, temperature=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights_2N = torch.randn(2, len(targets_N), generator=generator)
    found = kernel(on_shards, shards, logits_NV, targets_N, temperature, *weights_2N)
    expected = reference(logits_NV, targets_N, temperature, *weights_2N)
    real_NV = logits_NV.double().masked_fill(logits_NV < -1e30, 0.0) / temperature
    # fp32 holds z and log Z no finer than this; probabilities inherit it as a relative error.
    noise = 4 * EPS * max(1.0, float(real_NV.abs().max()) if real_NV.numel() else 1.0)
    half = logits_NV.dtype != torch.float32
    # An entropy is log Z minus a mean of z: two roundings of that size, and of the sum over V terms.
    for value, reference_value, scale in zip(found, expected, (1, 4, 8 / temperature), strict=True):
        rounding = torch.finfo(logits_NV.dtype).eps if half and value.dim() == 2 else 0.0
        torch.testing.assert_close(
            value.double(), reference_value, rtol=16 * EPS + rounding, atol=scale * noise + 1e-6
        )


def draw(rows, vocabulary, scale=3.0, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    logits_NV = scale * torch.randn(rows, vocabulary, generator=generator)
    return logits_NV.to(dtype), torch.randint(vocabulary, (rows,), generator=generator)


@pytest.mark.parametrize("shards", [0, 1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_forward_and_both_gradients(on_shards, shards, dtype, temperature):
    compare(on_shards, shards, *draw(33, 64, dtype=dtype), temperature)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(0, 9),
    width=st.integers(1, 17),
    shards=st.sampled_from([0, 1, 2, 4]),
    temperature=st.floats(0.1, 4.0),
    scale=st.floats(0.0, 30.0),
    seed=st.integers(0, 2**20),
)
def test_any_shape(on_shards, rows, width, shards, temperature, scale, seed):
    logits_NV, targets_N = draw(rows, width * max(1, shards), scale, seed=seed)
    compare(on_shards, shards, logits_NV, targets_N, temperature, seed)


@pytest.mark.parametrize("shards", [0, 1, 2, 4])
@pytest.mark.parametrize("rows", [0, 1])
def test_no_rows_and_one_row(on_shards, shards, rows):
    logits_NV, targets_N = draw(rows, 8)
    found = kernel(on_shards, shards, logits_NV, targets_N, 1.0, torch.ones(rows), torch.ones(rows))
    assert [tuple(value.shape) for value in found] == [(rows,), (rows,), (rows, 8)]
    compare(on_shards, shards, logits_NV, targets_N)


@pytest.mark.parametrize("shards", [0, 2, 4])
@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_logits_far_from_zero(on_shards, shards, offset):
    logits_NV, targets_N = draw(16, 32)
    compare(on_shards, shards, logits_NV + offset, targets_N)


@pytest.mark.parametrize("shards", [0, 2, 4])
def test_logits_that_span_twenty_thousand(on_shards, shards):
    logits_NV, targets_N = draw(16, 32)
    logits_NV[:8] = torch.where(logits_NV[:8] > 0, 1e4, -1e4)
    targets_N[:4] = logits_NV[:4].argmin(dim=1)  # a target of probability e^-20000 has a finite log-probability
    found = kernel(on_shards, shards, logits_NV, targets_N, 1.0, torch.ones(16), torch.zeros(16))
    assert (found[0][:4] < -19_000).all() and found[0].isfinite().all()
    compare(on_shards, shards, logits_NV, targets_N)


@pytest.mark.parametrize("shards", [0, 1, 2, 4])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padded_vocabulary_rows(on_shards, shards, temperature, dtype):
    """Logits of finfo.min, as `Llama.logits` writes: some in a shard, whole shards, all tokens but one."""
    logits_NV, targets_N = draw(12, 32, dtype=dtype)
    for row, real in enumerate([31, 25, 24, 17, 16, 9, 8, 5, 2, 1, 1, 1]):
        logits_NV[row, real:] = torch.finfo(dtype).min
        targets_N[row] %= real
    compare(on_shards, shards, logits_NV, targets_N, temperature)
    log_probs_N, entropy_N, gradient_NV = kernel(
        on_shards, shards, logits_NV, targets_N, temperature, torch.ones(12), torch.ones(12)
    )
    assert (log_probs_N[-3:] == 0).all() and entropy_N[-3:].abs().max() < 1e-6  # one token is left
    assert (gradient_NV[logits_NV == torch.finfo(dtype).min] == 0).all()


@pytest.mark.parametrize("shards", [0, 4])
def test_two_runs_agree_bit_for_bit(on_shards, shards):
    logits_NV, targets_N = draw(50, 64)
    weights_N = torch.linspace(-1, 1, 50)
    first, second = (
        kernel(on_shards, shards, logits_NV, targets_N, 0.7, weights_N, weights_N.flip(0)) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@settings(deadline=None, max_examples=25)
@given(vocabulary=st.integers(1, 40), offset=st.floats(-50, 50), seed=st.integers(0, 2**20))
def test_laws(vocabulary, offset, seed):
    """Probabilities sum to 1, a common offset changes nothing, and 0 <= H <= ln V."""
    logits_NV, _ = draw(1, vocabulary, seed=seed)
    targets_V = torch.arange(vocabulary)
    log_probs_V, entropy_V = vocab_parallel_logprob(logits_NV.expand(vocabulary, -1), targets_V)
    assert float(log_probs_V.double().exp().sum()) == pytest.approx(1.0, abs=1e-5)
    assert -1e-5 <= float(entropy_V[0]) <= math.log(vocabulary) + 1e-5
    shifted_V, _ = vocab_parallel_logprob(logits_NV.expand(vocabulary, -1) + offset, targets_V)
    torch.testing.assert_close(shifted_V, log_probs_V, rtol=0, atol=4e-5)


# Triton, in its interpreter.


@pytest.fixture
def small_blocks(monkeypatch):
    """Rows of several blocks without thousands of columns."""
    monkeypatch.setattr(module, "_block", lambda logits_Nv: (16, 1))


@pytest.mark.parametrize("shards, width", [(0, 1301), (2, 130), (4, 1), (4, 33), (1, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_forward_and_both_gradients(triton_backend, on_shards, shards, width, dtype):
    compare(on_shards, shards, *draw(5, width * max(1, shards), dtype=dtype), 0.7)


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(0, 3),
    width=st.integers(1, 40),
    shards=st.sampled_from([0, 1, 2, 4]),
    temperature=st.floats(0.1, 4.0),
    scale=st.floats(0.0, 30.0),
    seed=st.integers(0, 2**20),
)
def test_triton_any_shape(
    triton_backend, small_blocks, on_shards, rows, width, shards, temperature, scale, seed
):
    logits_NV, targets_N = draw(rows, width * max(1, shards), scale, seed=seed)
    compare(on_shards, shards, logits_NV, targets_N, temperature, seed)


@pytest.mark.parametrize("shards", [0, 2])
def test_triton_far_logits(triton_backend, small_blocks, on_shards, shards):
    for offset in (-1e4, 1e4):
        logits_NV, targets_N = draw(3, 34)
        compare(on_shards, shards, logits_NV + offset, targets_N)
    logits_NV = torch.where(logits_NV > 0, 1e4, -1e4)
    targets_N[:2] = logits_NV[:2].argmin(dim=1)
    compare(on_shards, shards, logits_NV, targets_N)


@pytest.mark.parametrize("shards", [0, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lowest", ["finfo.min", "-inf"])
def test_triton_padded_vocabulary_rows(triton_backend, small_blocks, on_shards, shards, dtype, lowest):
    """Some of a block, whole blocks, whole shards, and all tokens but one; once the last, once the first."""
    logits_NV, targets_N = draw(6, 72, dtype=dtype)
    value = torch.finfo(dtype).min if lowest == "finfo.min" else float("-inf")
    for row, real in enumerate([71, 37, 17, 5, 1]):
        logits_NV[row, real:] = value
        targets_N[row] %= real
    logits_NV[5, :71], targets_N[5] = value, 71
    compare(on_shards, shards, logits_NV, targets_N, 0.5)
    weights_N = torch.ones(6)
    log_probs_N, entropy_N, gradient_NV = kernel(
        on_shards, shards, logits_NV, targets_N, 0.5, weights_N, weights_N
    )
    assert (log_probs_N[-2:] == 0).all() and entropy_N[-2:].abs().max() < 1e-6
    assert (gradient_NV[logits_NV == value] == 0).all()


def test_triton_two_runs_agree_bit_for_bit(triton_backend, small_blocks, on_shards):
    logits_NV, targets_N = draw(4, 68)
    weights_N = torch.linspace(-1, 1, 4)
    for shards in (0, 4):
        first, second = (
            kernel(on_shards, shards, logits_NV, targets_N, 0.7, weights_N, weights_N.flip(0)) for _ in range(2)
        )
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_triton_consumes_the_logits_and_says_so(triton_backend):
    """The gradient takes the logits' storage; a graph that still needs them fails instead of using the gradient."""
    logits_NV, targets_N = draw(3, 20)
    leaf_NV = logits_NV.clone().requires_grad_()
    z_NV = leaf_NV * 1.0
    log_probs_N, _ = vocab_parallel_logprob(z_NV, targets_N)
    gradient_NV = torch.autograd.grad(log_probs_N.sum(), z_NV, retain_graph=True)[0]
    assert gradient_NV.data_ptr() == z_NV.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        log_probs_N.sum().backward()
    # Autograd runs the youngest first. A square that is older comes after the kernel and finds its input gone.
    z_NV = leaf_NV * 1.0
    squares = z_NV.square().sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (squares + vocab_parallel_logprob(z_NV, targets_N)[0].sum()).backward()
    # A younger one came before it, and both gradients arrive.
    leaf_NV.grad = None
    z_NV = leaf_NV * 1.0
    log_probs_N, _ = vocab_parallel_logprob(z_NV, targets_N)
    (z_NV.square().sum() + log_probs_N.sum()).backward()
    *_, expected_NV = reference(logits_NV, targets_N, 1.0, torch.ones(3), torch.zeros(3))
    torch.testing.assert_close(leaf_NV.grad.double(), expected_NV + 2 * logits_NV, rtol=1e-5, atol=1e-5)


def test_torch_leaves_the_logits_alone():
    logits_NV, targets_N = draw(3, 20)
    leaf_NV = logits_NV.clone().requires_grad_()
    log_probs_N, _ = vocab_parallel_logprob(leaf_NV, targets_N)
    log_probs_N.sum().backward(retain_graph=True)
    first_NV = leaf_NV.grad.clone()
    assert torch.equal(leaf_NV, logits_NV)
    log_probs_N.sum().backward()
    assert torch.equal(leaf_NV.grad, 2 * first_NV)


def test_triton_takes_non_contiguous_logits(triton_backend, on_shards):
    logits_NV, targets_N = draw(3, 20)
    whole = kernel(on_shards, 0, logits_NV, targets_N, 1.0, torch.ones(3), torch.ones(3))
    wide_NV = torch.full((3, 50), float("nan"))
    wide_NV[:, 7:27] = logits_NV
    for shape, view in (
        ("rows apart", wide_NV[:, 7:27]),
        ("columns apart", logits_NV.t().contiguous().t()),
        ("every second column", torch.stack([logits_NV, logits_NV * float("nan")], dim=2)[..., 0]),
    ):
        leaf_NV = view.detach().requires_grad_()
        assert not leaf_NV.is_contiguous(), shape
        log_probs_N, entropy_N = vocab_parallel_logprob(leaf_NV, targets_N)
        (log_probs_N + entropy_N).sum().backward()
        for found, expected in zip((log_probs_N, entropy_N, leaf_NV.grad), whole, strict=True):
            assert torch.equal(found, expected), shape
    assert wide_NV[:, :7].isnan().all() and wide_NV[:, 27:].isnan().all()
    # Expanded rows share memory, which a gradient in place would destroy row by row.
    row_1V = logits_NV[:1].clone().requires_grad_()
    log_probs_N, entropy_N = vocab_parallel_logprob(row_1V.expand(3, -1), targets_N)
    log_probs_N.sum().backward()
    expected = reference(logits_NV[:1].expand(3, -1), targets_N, 1.0, torch.ones(3), torch.zeros(3))
    torch.testing.assert_close(row_1V.grad[0].double(), expected[2].sum(dim=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_without_entropy(triton_backend, on_shards, backend):
    logits_NV, targets_N = draw(4, 20)
    set_backend(backend)

    def on_rank(rank, group):
        shard_Nv = logits_NV[:, rank * 10 : (rank + 1) * 10].clone().requires_grad_()
        log_probs_N, entropy_N = vocab_parallel_logprob(shard_Nv, targets_N, 0.8, group, with_entropy=False)
        log_probs_N.sum().backward()
        assert entropy_N is None
        return log_probs_N.detach(), shard_Nv.grad

    results = on_shards(2, on_rank)
    log_probs_N, _, gradient_NV = reference(logits_NV, targets_N, 0.8, torch.ones(4), torch.zeros(4))
    torch.testing.assert_close(results[0][0].double(), log_probs_N, rtol=1e-5, atol=1e-6)
    found_NV = torch.cat([gradient_Nv for _, gradient_Nv in results], dim=1)
    torch.testing.assert_close(found_NV.double(), gradient_NV, rtol=1e-5, atol=1e-6)
