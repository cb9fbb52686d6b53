"""Log-probabilities and the PPO-Lag loss from hidden states, and their gradients, against float64 formulas.

Legend: N tokens, V vocabulary, h hidden size, V/p of the vocabulary on each of p shards (`weight_vh`).
"""

import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_safe.kernels.backend import set_backend
from megatron_safe.kernels.linear_logprob import linear_logprob
from megatron_safe.kernels.linear_ppo_lag_loss import linear_ppo_lag_loss

TEMPERATURE, LAMBDA, CLIP, MEAN, RSTD = 0.7, 0.6, 0.2, 0.1, 1.4


@pytest.fixture(scope="module", autouse=True)
def collectives_of_sequence_parallelism(on_shards):
    def all_gather_into_tensor(whole, tensor, group):
        whole.copy_(torch.cat(group.meeting.exchange(group.rank(), tensor)))

    def reduce_scatter_tensor(own, tensor, group):
        own.copy_(sum(group.meeting.exchange(group.rank(), tensor)).chunk(group.size())[group.rank()])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather_into_tensor", all_gather_into_tensor)
        patch.setattr(dist, "reduce_scatter_tensor", reduce_scatter_tensor)
        yield


@pytest.fixture(params=["torch", "triton"])
def kernels(request):
    if request.param == "triton":
        request.getfixturevalue("triton_backend")  # which also fills new tensors with NaN
    else:
        set_backend("torch")
    yield
    set_backend("auto")


class Problem:
    """Hidden states, a weight whose last `padding` rows are garbage, and everything that the losses read."""

    def __init__(self, rows, vocabulary, padding=0, hidden=5, dtype=torch.float32, scale=1.0, seed=0, live=0.7):
        generator = torch.Generator().manual_seed(seed)
        self.valid = vocabulary - padding
        self.hidden_Nh = torch.randn(rows, hidden, generator=generator).to(dtype)
        self.weight_Vh = (scale * torch.randn(vocabulary, hidden, generator=generator)).to(dtype)
        self.weight_Vh[self.valid :] = 50.0
        self.targets_N = torch.randint(self.valid, (rows,), generator=generator)
        self.mask_N = torch.rand(rows, generator=generator) < live
        self.upstream_2N = torch.randn(2, rows, generator=generator) * (torch.rand(2, rows, generator=generator) < live)
        self.advantages_2N = torch.randn(2, rows, generator=generator)
        self.weights_N = torch.rand(rows, generator=generator) / max(rows, 1)
        self.dtype = dtype
        self.sample_with(0.5 * torch.randn(rows, generator=generator))

    def sample_with(self, drift_N):
        """Old log-probabilities that far away: ratios on both sides of the clip range. Outside the mask, anything."""
        self.old_N = (self.log_p_NV().gather(1, self.targets_N[:, None])[:, 0] + drift_N).float()
        self.old_N[~self.mask_N] = 1e3

    def log_p_NV(self):
        logits_NV = self.hidden_Nh.double() @ self.weight_Vh[: self.valid].double().T
        return torch.log_softmax(logits_NV / TEMPERATURE, dim=1)

    def gradients(self, weights_N, entropy_weights_N):
        """d(Σ w log p + Σ u H) / d(hidden, weight), float64, from the formulas."""
        log_p_NV = self.log_p_NV()
        p_NV = log_p_NV.exp()
        entropy_N = -(p_NV * log_p_NV).sum(dim=1)
        one_hot_NV = torch.nn.functional.one_hot(self.targets_N, self.valid).view(-1, self.valid)
        gradient_NV = weights_N[:, None] * (one_hot_NV - p_NV)
        gradient_NV = gradient_NV - entropy_weights_N[:, None] * p_NV * (log_p_NV + entropy_N[:, None])
        gradient_NV = torch.nn.functional.pad(gradient_NV / TEMPERATURE, (0, len(self.weight_Vh) - self.valid))
        return gradient_NV @ self.weight_Vh.double(), gradient_NV.T @ self.hidden_Nh.double()

    def log_prob_reference(self):
        log_p_NV = self.log_p_NV()
        entropy_N = [-math.fsum(math.exp(x) * x for x in row) for row in log_p_NV.tolist()]
        log_probs_N = log_p_NV.gather(1, self.targets_N[:, None])[:, 0]
        gradients = self.gradients(*self.upstream_2N.double())
        return log_probs_N, torch.tensor(entropy_N, dtype=torch.float64), *gradients

    def loss_reference(self):
        """Loss, statistics and gradients, token by token in Python."""
        log_probs_N, entropy_N, *_ = self.log_prob_reference()
        loss, statistics, gradient_N = 0.0, [0.0] * 4, []
        for n in range(len(self.targets_N)):
            if not self.mask_N[n]:
                gradient_N.append(0.0)
                continue
            advantage = float(self.advantages_2N[0, n] - LAMBDA * self.advantages_2N[1, n]) / (1 + LAMBDA)
            advantage = (advantage - MEAN) * RSTD
            log_ratio = float(log_probs_N[n]) - float(self.old_N[n])
            ratio, weight = math.exp(log_ratio), float(self.weights_N[n])
            clipped = min(max(ratio, 1 - CLIP), 1 + CLIP)
            loss -= weight * min(ratio * advantage, clipped * advantage)
            gradient_N.append(-weight * ratio * advantage if ratio * advantage <= clipped * advantage else 0.0)
            token = (float(entropy_N[n]), float(abs(ratio - 1) > CLIP), ratio - 1 - log_ratio, 1.0)
            statistics = [a + b for a, b in zip(statistics, token, strict=True)]
        gradient_N = torch.tensor(gradient_N, dtype=torch.float64)
        gradients = self.gradients(gradient_N, torch.zeros_like(gradient_N))
        return torch.tensor(loss), torch.tensor(statistics, dtype=torch.float64), *gradients

    def close(self, found, expected, floor=1e-3):
        """To a share of the largest value: half precision rounds logits and their gradients to 8 bits, fp32 to 24.

        floor: the least such value. Where p is near 1 log p and gradients cancel to less than the logits' rounding.
        """
        tolerance = 0.03 if self.dtype == torch.bfloat16 else 1e-5
        for value, reference in zip(found, expected, strict=True):
            scale = max(floor, float(reference.abs().max())) if reference.numel() else 0.0
            torch.testing.assert_close(value.double(), reference.double(), rtol=0, atol=tolerance * scale)


def on_every_shard(on_shards, shards, problem, call, chunk_size, sequence_parallel):
    """(two results, d hidden, d weight) of call(hidden, weight, **options) -> (results, loss) over shards.

    shards 0: no group. What every rank must agree on is checked here.
    """
    size = max(shards, 1)
    width = len(problem.weight_Vh) // size

    def on_rank(rank, group):
        hidden = problem.hidden_Nh.chunk(size)[rank] if sequence_parallel else problem.hidden_Nh
        hidden = hidden.clone().requires_grad_()
        weight_vh = problem.weight_Vh[rank * width : (rank + 1) * width].clone().requires_grad_()
        results, loss = call(
            hidden, weight_vh, temperature=TEMPERATURE, group=group, valid_vocab=problem.valid,
            chunk_size=chunk_size, sequence_parallel=sequence_parallel,
        )  # fmt: skip
        loss.backward()
        assert hidden.grad.dtype == weight_vh.grad.dtype == problem.dtype
        return *(result.detach() for result in results), hidden.grad, weight_vh.grad

    ranks = on_shards(shards, on_rank) if shards else [on_rank(0, None)]
    for other in ranks[1:]:
        agreed = 2 if sequence_parallel else 3
        assert all(torch.equal(a, b) for a, b in zip(ranks[0][:agreed], other[:agreed], strict=True))
    hidden_grad = torch.cat([rank[2] for rank in ranks]) if sequence_parallel else ranks[0][2]
    return ranks[0][0], ranks[0][1], hidden_grad, torch.cat([rank[3] for rank in ranks])


def log_probs(on_shards, shards, problem, chunk_size=None, sequence_parallel=False):
    def call(hidden, weight_vh, **options):
        results = linear_logprob(hidden, weight_vh, problem.targets_N, **options)
        return results, (torch.stack(results) * problem.upstream_2N).sum()

    return on_every_shard(on_shards, shards, problem, call, chunk_size, sequence_parallel)


def ppo_call(problem, hidden, weight_vh, **options):
    return linear_ppo_lag_loss(
        hidden, weight_vh, problem.targets_N, problem.old_N, *problem.advantages_2N, problem.mask_N,
        problem.weights_N, torch.tensor(LAMBDA), CLIP, advantage_mean=torch.tensor(MEAN),
        advantage_rstd=torch.tensor(RSTD), **options,
    )  # fmt: skip


def ppo_loss(on_shards, shards, problem, chunk_size=None, sequence_parallel=False, scale=1.0):
    def call(hidden, weight_vh, **options):
        loss, statistics_4 = ppo_call(problem, hidden, weight_vh, **options)
        return (loss, statistics_4), scale * loss

    return on_every_shard(on_shards, shards, problem, call, chunk_size, sequence_parallel)


# 9 of 32 are padding: the last of four shards is nothing else.
CHUNKS_AND_PADDING = [(None, 0), (1, 3), (5, 9), (13, 0), (100, 9)]


@pytest.mark.parametrize("chunk_size, padding", CHUNKS_AND_PADDING)
@pytest.mark.parametrize("shards", [0, 1, 2, 4])
def test_log_probs_and_gradients(kernels, on_shards, shards, chunk_size, padding):
    problem = Problem(13, 32, padding)
    problem.close(log_probs(on_shards, shards, problem, chunk_size), problem.log_prob_reference())


@pytest.mark.parametrize("chunk_size, padding", CHUNKS_AND_PADDING)
@pytest.mark.parametrize("shards", [0, 1, 2, 4])
def test_loss_and_gradients(kernels, on_shards, shards, chunk_size, padding):
    problem = Problem(13, 32, padding)
    expected = problem.loss_reference()
    assert 0 < float(expected[1][1]) < float(expected[1][3])  # some tokens are clipped, some are not
    problem.close(ppo_loss(on_shards, shards, problem, chunk_size), expected)


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(0, 6),
    width=st.integers(1, 9),
    shards=st.sampled_from([0, 1, 2, 4]),
    padding=st.integers(0, 8),
    chunk_size=st.integers(1, 7),
    scale=st.floats(0.0, 1.5),
    live=st.floats(0.0, 1.0),
    seed=st.integers(0, 2**20),
)
def test_any_shape(kernels, on_shards, rows, width, shards, padding, chunk_size, scale, live, seed):
    vocabulary = width * max(shards, 1)
    problem = Problem(rows, vocabulary, min(padding, vocabulary - 1), scale=scale, seed=seed, live=live)
    problem.close(log_probs(on_shards, shards, problem, chunk_size), problem.log_prob_reference(), floor=1.0)
    found, expected = ppo_loss(on_shards, shards, problem, chunk_size), problem.loss_reference()
    # A ratio within rounding of the clip bound may fall on either side of it.
    log_ratio_N = problem.log_prob_reference()[0] - problem.old_N
    bounds_2 = torch.tensor([1 - CLIP, 1 + CLIP], dtype=torch.float64).log()
    if not ((log_ratio_N[:, None] - bounds_2).abs() < 1e-4).any():
        problem.close(found, expected, floor=1.0)


@pytest.mark.parametrize("shards", [0, 4])
@pytest.mark.parametrize("rows", [0, 1])
def test_no_rows_and_one_row(kernels, on_shards, shards, rows):
    problem = Problem(rows, 8, live=1.1)
    problem.close(log_probs(on_shards, shards, problem), problem.log_prob_reference())
    problem.close(ppo_loss(on_shards, shards, problem), problem.loss_reference())


@pytest.mark.parametrize("shards", [0, 2])
def test_bfloat16(kernels, on_shards, shards):
    problem = Problem(17, 32, 3, hidden=16, dtype=torch.bfloat16, scale=0.5)
    problem.close(log_probs(on_shards, shards, problem, 8), problem.log_prob_reference())
    problem.close(ppo_loss(on_shards, shards, problem, 8), problem.loss_reference())


def test_weight_gradient_sums_halves_in_fp32():
    """512 contributions of a half: a bf16 running sum would stop at 128."""
    hidden_Nh = torch.ones(512, 1, dtype=torch.bfloat16)
    weight_vh = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    log_probs_N, _ = linear_logprob(hidden_Nh, weight_vh, torch.zeros(512).long(), chunk_size=1)
    log_probs_N.sum().backward()
    assert weight_vh.grad.tolist() == [[256.0], [-256.0]]


@pytest.mark.parametrize("compute", [log_probs, ppo_loss])
@pytest.mark.parametrize("shards", [2, 4])
def test_sequence_parallel_is_the_same(kernels, on_shards, shards, compute):
    problem = Problem(12, 32, 3)
    plain, split = (compute(on_shards, shards, problem, 7, parallel) for parallel in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(plain, split, strict=True))


@pytest.mark.parametrize("compute", [log_probs, ppo_loss])
@pytest.mark.parametrize("shards", [0, 4])
def test_two_runs_agree_bit_for_bit(kernels, on_shards, shards, compute):
    problem = Problem(17, 32, 3)
    first, second = (compute(on_shards, shards, problem, 8) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("shards", [0, 2])
def test_a_mask_of_zeros(kernels, on_shards, shards):
    problem = Problem(12, 16)
    problem.mask_N[:] = False
    problem.old_N[:], problem.advantages_2N[:] = math.nan, math.inf
    for value in ppo_loss(on_shards, shards, problem, 5):
        assert (value == 0).all()
    problem.upstream_2N[:] = 0
    assert all((gradient == 0).all() for gradient in log_probs(on_shards, shards, problem, 5)[2:])


@pytest.mark.parametrize("scale", [0.0, -2.5])
def test_upstream_gradient_scales_the_loss(kernels, on_shards, scale):
    problem = Problem(12, 32)
    *_, hidden_grad, weight_grad = ppo_loss(on_shards, 2, problem, scale=scale)
    *_, expected_hidden, expected_weight = problem.loss_reference()
    problem.close((hidden_grad, weight_grad), (scale * expected_hidden, scale * expected_weight))


def test_a_second_backward_pass_is_refused(kernels):
    problem = Problem(4, 8)
    loss, _ = ppo_call(problem, problem.hidden_Nh, problem.weight_Vh.clone().requires_grad_())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="first backward"):
        loss.backward()


def test_without_gradients(kernels):
    """Scoring, a frozen weight, frozen hidden states: the same numbers, and only the gradients asked for."""
    problem = Problem(12, 32)
    *expected, hidden_grad, weight_grad = problem.loss_reference()
    for hidden_learns, weight_learns in [(False, False), (True, False), (False, True)]:
        hidden_Nh = problem.hidden_Nh.clone().requires_grad_(hidden_learns)
        weight_Vh = problem.weight_Vh.clone().requires_grad_(weight_learns)
        found = ppo_call(problem, hidden_Nh, weight_Vh, temperature=TEMPERATURE)
        problem.close((value.detach() for value in found), expected)
        assert found[0].requires_grad == (hidden_learns or weight_learns)
        if found[0].requires_grad:
            found[0].backward()
        assert (hidden_Nh.grad is not None, weight_Vh.grad is not None) == (hidden_learns, weight_learns)
        for tensor, reference in ((hidden_Nh, hidden_grad), (weight_Vh, weight_grad)):
            if tensor.grad is not None:
                problem.close((tensor.grad,), (reference,))
    with torch.no_grad():
        scored = linear_logprob(hidden_Nh, weight_Vh, problem.targets_N, TEMPERATURE)
    assert not scored[0].requires_grad
    problem.close(scored, problem.log_prob_reference()[:2])


def megatron_parameter(weight_Vh, main_dtype, tied):
    """A parameter as Megatron's DistributedDataParallel keeps it: gradients end in `main_grad`."""
    parameter = torch.nn.Parameter(weight_Vh.clone())
    parameter.main_grad = torch.ones_like(parameter, dtype=main_dtype)  # what earlier micro-batches left
    parameter.grad_added_to_main_grad, parameter.zero_out_wgrad = False, tied

    def hook(parameter):  # as DistributedDataParallel._make_backward_post_hook
        if not parameter.grad_added_to_main_grad or parameter.zero_out_wgrad:
            parameter.main_grad.add_(parameter.grad)
        parameter.grad = None

    parameter.register_post_accumulate_grad_hook(hook)
    return parameter


@pytest.mark.parametrize("loss", ["log_probs", "ppo"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fusion", [False, True])
@pytest.mark.parametrize("main_dtype", [torch.float32, torch.float64])  # float64: any dtype that is not fp32
def test_main_grad(kernels, loss, tied, fusion, main_dtype):
    """Two micro-batches; with tied weights the embedding's gradient arrives at the same parameter."""
    problem = Problem(12, 32)
    tokens_N = torch.randint(32, (12,), generator=torch.Generator().manual_seed(5))
    if tied:
        problem.hidden_Nh = problem.weight_Vh[tokens_N].clone()
        problem.sample_with(torch.linspace(-0.5, 0.5, 12))
    weight_Vh = megatron_parameter(problem.weight_Vh, main_dtype, tied)
    options = {"temperature": TEMPERATURE, "chunk_size": 7, "gradient_accumulation_fusion": fusion}
    for _ in range(2):
        hidden_Nh = torch.nn.functional.embedding(tokens_N, weight_Vh) if tied else problem.hidden_Nh
        if loss == "ppo":
            ppo_call(problem, hidden_Nh, weight_Vh, **options)[0].backward()
        else:
            results = linear_logprob(hidden_Nh, weight_Vh, problem.targets_N, **options)
            (torch.stack(results) * problem.upstream_2N).sum().backward()
    reference = problem.loss_reference() if loss == "ppo" else problem.log_prob_reference()
    *_, hidden_grad, expected = reference
    if tied:
        expected = expected.index_add(0, tokens_N, hidden_grad)
    assert weight_Vh.grad_added_to_main_grad == fusion
    problem.close((weight_Vh.main_grad - 1,), (2 * expected,))
