"""The Lagrangian PPO loss, its gradient and its statistics against the formulas token by token, on both backends.

Legend: B sequences, T actions, N tokens, V vocabulary.
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_safe.kernels import vocab_parallel_logprob as logprob_module
from megatron_safe.kernels.backend import set_backend
from megatron_safe.kernels.ppo_lag_loss import STATISTICS, ppo_lag_loss, token_weights

CLIP = 0.2
BACKENDS = ["torch", "triton"]


@pytest.fixture(autouse=True)
def both_backends(triton_backend, monkeypatch):
    """Outputs poisoned, and rows of several blocks without thousands of columns."""
    monkeypatch.setattr(logprob_module, "_block", lambda logits_Nv: (16, 1))


def problem(rows, vocabulary, dtype=torch.float32, scale=2.0, seed=0, drift=0.3, temperature=1.0):
    """Arguments as `ppo_lag_loss` takes them up to lam, with a ratio that leaves the clip range on both sides."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    logits_NV = (scale * normal(rows, vocabulary)).to(dtype)
    targets_N = torch.randint(vocabulary, (rows,), generator=generator)
    log_probs_N = torch.log_softmax(logits_NV.double() / temperature, dim=1).gather(1, targets_N[:, None])[:, 0].float()
    mask_N = torch.rand(rows, generator=generator) < 0.7
    weights_N = torch.rand(rows, generator=generator) / max(rows, 1)
    return [
        logits_NV, targets_N, log_probs_N + drift * normal(rows), normal(rows), normal(rows), mask_N, weights_N,
        torch.rand((), generator=generator) * 3,
    ]  # fmt: skip


def reference(arguments, temperature=1.0, mean=0.0, rstd=1.0):
    """(loss, statistics, d loss / d logits, how near a token's ratio comes to the clip bound), float64, in loops."""
    logits_NV, targets, old, reward, cost, mask, weights, lam = (x.tolist() for x in arguments)
    loss, sums, margin = 0.0, dict.fromkeys(STATISTICS, 0.0), 1.0
    gradient_NV = torch.zeros(len(targets), arguments[0].size(1), dtype=torch.float64)
    for n, z in enumerate(logits_NV):
        if not mask[n]:
            continue
        z = [max(x, -1e300) / temperature for x in z]
        top = max(z)
        log_z = top + math.log(math.fsum(math.exp(x - top) for x in z))
        log_p = [x - log_z for x in z]
        p = [math.exp(x) for x in log_p]
        log_ratio = log_p[targets[n]] - old[n]
        ratio = math.exp(log_ratio)
        advantage = ((reward[n] - lam * cost[n]) / (1 + lam) - mean) * rstd
        clipped = min(max(ratio, 1 - CLIP), 1 + CLIP)
        loss -= weights[n] * min(ratio * advantage, clipped * advantage)
        slope = -weights[n] * ratio * advantage if ratio * advantage <= clipped * advantage else 0.0
        for v in range(len(z)):
            gradient_NV[n, v] = slope * ((v == targets[n]) - p[v]) / temperature
        sums["entropy"] -= math.fsum(a * b for a, b in zip(p, log_p, strict=True) if a > 0)
        sums["clipped"] += abs(ratio - 1) > CLIP
        sums["approximate_kl"] += math.expm1(log_ratio) - log_ratio
        sums["tokens"] += 1
        margin = min(margin, abs(abs(ratio - 1) - CLIP))
    return loss, [sums[name] for name in STATISTICS], gradient_NV, margin


def kernel(on_shards, shards, arguments, temperature=1.0, scale=1.0, **moments):
    """What the kernel gives, with `scale` x loss sent backward; the same from every rank."""
    width = arguments[0].size(1) // max(1, shards)

    def on_rank(rank, group):
        shard_Nv = arguments[0][:, rank * width : (rank + 1) * width].clone().requires_grad_()
        loss, statistics_4 = ppo_lag_loss(shard_Nv, *arguments[1:], CLIP, temperature, group, **moments)
        assert loss.shape == () and loss.dtype == torch.float32
        assert statistics_4.shape == (4,) and statistics_4.dtype == torch.float64 and not statistics_4.requires_grad
        (scale * loss).backward()
        return loss.detach(), statistics_4, shard_Nv.grad

    results = on_shards(shards, on_rank) if shards else [on_rank(0, None)]
    for loss, statistics_4, _ in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(statistics_4, results[0][1])
    return results[0][0], results[0][1], torch.cat([gradient_Nv for *_, gradient_Nv in results], dim=1)


def compare(found, expected, tolerance=2e-5):
    loss, statistics_4, gradient_NV = found
    expected_loss, expected_statistics, expected_NV, margin = expected
    assert margin > 1e-6, "the reference itself stands on the clip bound"
    assert float(loss) == pytest.approx(expected_loss, rel=tolerance, abs=tolerance)
    assert statistics_4.tolist() == pytest.approx(expected_statistics, rel=tolerance, abs=tolerance)
    rounding = 0.0 if gradient_NV.dtype == torch.float32 else torch.finfo(gradient_NV.dtype).eps
    torch.testing.assert_close(gradient_NV.double(), expected_NV, rtol=tolerance + rounding, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shards", [0, 1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_against_the_formulas(on_shards, backend, shards, dtype):
    set_backend(backend)
    arguments = problem(9, 68, dtype, temperature=0.8)
    expected = reference(arguments, 0.8)
    assert 0 < expected[1][1] < expected[1][3] < 9  # some clipped, some not, some masked
    loss, statistics_4, gradient_NV = kernel(on_shards, shards, arguments, 0.8)
    compare((loss, statistics_4, gradient_NV), expected)
    assert (gradient_NV[~arguments[5]] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(0, 5), width=st.integers(1, 20), shards=st.sampled_from([0, 1, 2, 4]),
    temperature=st.floats(0.3, 3.0), seed=st.integers(0, 2**20), drift=st.floats(0.0, 2.0),
)  # fmt: skip
def test_any_shape(on_shards, backend, rows, width, shards, temperature, seed, drift):
    set_backend(backend)
    arguments = problem(rows, width * max(1, shards), seed=seed, drift=drift, temperature=temperature)
    expected = reference(arguments, temperature)
    if expected[-1] > 1e-5:
        compare(kernel(on_shards, shards, arguments, temperature), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_tokens_than_a_block_and_a_scaled_loss(on_shards, backend):
    set_backend(backend)
    arguments = problem(131, 3)
    loss, statistics_4, gradient_NV = kernel(on_shards, 0, arguments, scale=-2.5)
    expected = reference(arguments)
    compare((loss, statistics_4, gradient_NV / -2.5), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_whitening_is_that_of_the_whole_batch(on_shards, backend):
    set_backend(backend)
    arguments = problem(7, 10)
    mean, rstd = torch.tensor(0.3, dtype=torch.float64), torch.tensor(1.7)
    found = kernel(on_shards, 2, arguments, advantage_mean=mean, advantage_rstd=rstd)
    compare(found, reference(arguments, mean=float(mean), rstd=float(rstd)))
    with pytest.raises(ValueError, match="both or neither"):
        ppo_lag_loss(*arguments, CLIP, advantage_mean=mean)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shards", [0, 2])
def test_what_stands_outside_the_mask_does_not_matter(on_shards, backend, shards):
    set_backend(backend)
    arguments = problem(6, 12)
    mask_N = arguments[5] = torch.tensor([True, False, True, False, False, True])
    found = kernel(on_shards, shards, arguments)
    for index, value in ((2, -1e30), (3, float("nan")), (4, float("inf")), (6, float("nan"))):
        arguments[index] = arguments[index].masked_fill(~mask_N, value)
    arguments[1] = arguments[1].masked_fill(~mask_N, -100)
    again = kernel(on_shards, shards, arguments)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_a_mask_of_all_zeros(on_shards, backend, rows):
    set_backend(backend)
    arguments = problem(rows, 40)
    arguments[5] = torch.zeros(rows, dtype=torch.bool)
    for poison in (False, True):
        if poison:
            for index in (2, 3, 4, 6):
                arguments[index] = torch.full((rows,), float("nan"))
        loss, statistics_4, gradient_NV = kernel(on_shards, 0, arguments)
        assert float(loss) == 0 and (statistics_4 == 0).all() and (gradient_NV == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shards", [0, 4])
def test_extreme_logits_and_padding(on_shards, backend, shards):
    set_backend(backend)
    arguments = problem(6, 32)
    arguments[5] = torch.ones(6, dtype=torch.bool)
    logits_NV, targets_N = arguments[:2]
    logits_NV[0] += 1e4
    logits_NV[1] -= 1e4
    logits_NV[2] = torch.where(logits_NV[2] > 0, 1e4, -1e4)
    targets_N[2] = logits_NV[2].argmax()
    logits_NV[3, 9:] = torch.finfo(torch.float32).min
    logits_NV[4, torch.arange(32) != 17] = -torch.inf
    targets_N[3], targets_N[4] = 4, 17
    arguments[2] = torch.log_softmax(logits_NV.double(), dim=1).gather(1, targets_N[:, None])[:, 0].float() - 0.05
    compare(kernel(on_shards, shards, arguments), reference(arguments), tolerance=5e-3)  # fp32 near 1e4: 2^-10


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_absurd_ratio_is_held(backend, on_shards):
    """ρ = e^20000 and an advantage of 0: 0, not 0 · inf."""
    set_backend(backend)
    arguments = problem(2, 4)
    arguments[2] = torch.full((2,), -2e4)
    arguments[3] = arguments[4] = torch.zeros(2)
    arguments[5] = torch.ones(2, dtype=torch.bool)
    loss, statistics_4, gradient_NV = kernel(on_shards, 0, arguments)
    assert float(loss) == 0 and statistics_4.isfinite().all() and (gradient_NV == 0).all()


@pytest.mark.parametrize("shards", [0, 2])
def test_two_runs_agree_bit_for_bit(on_shards, shards):
    arguments = problem(5, 36, torch.bfloat16)
    first, second = (kernel(on_shards, shards, arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_kl_is_exact_around_a_ratio_of_one():
    """The series and the closed form of (ρ - 1) - log ρ, from ρ = 1 over their seam to far away."""
    log_ratios_N = torch.tensor([0.0, 1e-6, -1e-3, 0.1, -0.499, 0.499, -0.5, 0.501, 1.0, -3.0, 4.0])
    n = len(log_ratios_N)
    ones_N = torch.ones(n)
    for x in log_ratios_N:
        _, statistics_4 = ppo_lag_loss(
            torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64), -x[None], ones_N[:1], ones_N[:1],
            torch.ones(1, dtype=torch.bool), ones_N[:1], torch.tensor(0.0), CLIP,
        )  # fmt: skip
        expected = math.expm1(float(x)) - float(x)
        assert float(statistics_4[2]) == pytest.approx(expected, rel=3e-6, abs=1e-20)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["sequence", "token"])
def test_means_over_sequences_and_tokens_of_the_whitened_loss(on_shards, backend, mode):
    """From [B, T] with padding and an empty row."""
    set_backend(backend)
    mask = [[0, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]]
    mask_BT, normalizer = torch.tensor(mask, dtype=torch.bool), 7
    arguments = problem(12, 20)
    _, _, _, reward, cost, _, _, lam = (x.tolist() for x in arguments)
    inside = [n for n in range(12) if mask[n // 4][n % 4]]
    mixed = [(reward[n] - lam * cost[n]) / (1 + lam) for n in inside]
    mean = math.fsum(mixed) / len(mixed)
    rstd = 1 / math.sqrt(math.fsum((x - mean) ** 2 for x in mixed) / len(mixed))
    row_tokens = [sum(mask[n // 4]) if mode == "sequence" else 1 for n in range(12)]
    weights = [1 / row_tokens[n] / normalizer if n in inside else 0.0 for n in range(12)]

    arguments[5:7] = mask_BT.flatten(), torch.tensor(weights, dtype=torch.float64)
    expected = reference(arguments, mean=mean, rstd=rstd)
    arguments[6] = token_weights(mask_BT, mode, normalizer).flatten()
    moments = dict(advantage_mean=torch.tensor(mean), advantage_rstd=torch.tensor(rstd))
    compare(kernel(on_shards, 0, arguments, **moments), expected)


def test_token_weights():
    mask_BT = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    third, quarter = 1 / 2 / 3, 1 / 4 / 3
    assert token_weights(mask_BT, "sequence", 3).tolist() == [
        pytest.approx([0, third, third, 0]), [0] * 4, pytest.approx([quarter] * 4)
    ]  # fmt: skip
    tenth = pytest.approx(0.1)
    assert token_weights(mask_BT, "token", torch.tensor(10)).tolist() == [[0, tenth, tenth, 0], [0] * 4, [tenth] * 4]
    assert token_weights(mask_BT, "token", 0).sum() == 6  # a batch without an action: nothing divides by 0
    with pytest.raises(ValueError, match="'sequence' or 'token', found 'mean'"):
        token_weights(mask_BT, "mean", 3)
