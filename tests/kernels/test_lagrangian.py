import math
from collections import deque

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_safe.kernels.lagrangian import lagrange_state, lagrange_step

RULE = dict(lambda_lr=0.3, threshold=0.1, lambda_min=0.01, lambda_max=10.0)


class Reference:
    """The rule on the host: ln λ and the window in Python floats, with an exact sum."""

    def __init__(self, window, lambda_init=1.0, **changed):
        self.log_lambda, self.costs, self.rule = math.log(lambda_init), deque(maxlen=window), RULE | changed

    def step(self, costs, update=True):
        self.costs.extend(costs)
        if self.costs and update:
            excess = self.mean() - self.rule["threshold"]
            self.log_lambda += self.rule["lambda_lr"] * math.exp(self.log_lambda) * excess
            floor, ceiling = math.log(self.rule["lambda_min"]), math.log(self.rule["lambda_max"])
            self.log_lambda = min(max(self.log_lambda, floor), ceiling)

    def mean(self):
        return math.fsum(self.costs) / len(self.costs) if self.costs else math.nan


def check(state, reference, mean_1):
    assert state.lambda_1.item() == pytest.approx(math.exp(reference.log_lambda), rel=1e-12, abs=0)
    assert mean_1.item() == pytest.approx(reference.mean(), rel=1e-12, abs=1e-14, nan_ok=True)
    episodes, window = state.episodes_1.item(), state.costs_W.numel()
    ring = [state.costs_W[i % window].item() for i in range(max(0, episodes - window), episodes)]
    assert ring == list(reference.costs)  # the same costs in the same order, exactly


batches = st.lists(
    st.lists(st.tuples(st.floats(-5, 5, width=32), st.booleans()), min_size=0, max_size=9), min_size=1, max_size=6
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches=batches, window=st.integers(1, 12), delay=st.integers(0, 3), lr=st.floats(0, 3))
def test_equals_the_rule(device, batches, window, delay, lr):
    reference = Reference(window, lambda_lr=lr)
    state = lagrange_state(1.0, window, device)
    for step, batch in enumerate(batches):
        costs_B = torch.tensor([cost for cost, _ in batch], dtype=torch.float32, device=device)
        counted_B = torch.tensor([counts for _, counts in batch], dtype=torch.bool, device=device)
        reference.step([cost for cost, counts in batch if counts], step >= delay)
        mean_1 = lagrange_step(state, costs_B, counted_B, step >= delay, **(RULE | {"lambda_lr": lr}))
        check(state, reference, mean_1)


def test_a_batch_larger_than_the_window_leaves_its_end(device):
    state, reference = lagrange_state(1.0, 5, device), Reference(5)
    for size in (3, 17, 5, 1):
        costs_B = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(device)
        reference.step(costs_B.tolist())
        check(state, reference, lagrange_step(state, costs_B, None, True, **RULE))


@pytest.mark.parametrize("cost, bound", [(1e6, 10.0), (-1e6, 0.01)])
def test_bounds_are_exact(device, cost, bound):
    state = lagrange_state(1.0, 4, device)
    lagrange_step(state, torch.tensor([cost], device=device), None, True, **RULE)
    assert state.lambda_1.item() == bound


def test_before_the_first_episode_nothing_moves(device):
    state = lagrange_state(2.0, 3, device)
    uncounted_B = torch.zeros(2, dtype=torch.bool, device=device)
    mean_1 = lagrange_step(state, torch.ones(2, device=device), uncounted_B, True, **RULE)
    assert mean_1.isnan() and state.lambda_1.item() == 2.0 and state.episodes_1.item() == 0


def test_update_false_only_observes(device):
    state = lagrange_state(2.0, 3, device)
    mean_1 = lagrange_step(state, torch.tensor([1.0, 2.0], device=device), None, False, **RULE)
    assert mean_1.item() == 1.5 and state.lambda_1.item() == 2.0 and state.episodes_1.item() == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_cost_that_is_not_finite_never_counts(device, bad):
    state, reference = lagrange_state(1.0, 8, device), Reference(8)
    reference.step([0.5, -2.0])
    mean_1 = lagrange_step(state, torch.tensor([0.5, bad, -2.0], device=device), None, True, **RULE)
    check(state, reference, mean_1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_costs_of_other_dtypes(device, dtype):
    state, reference = lagrange_state(1.0, 8, device), Reference(8)
    costs_B = torch.tensor([0.3, -1.7, 2.2]).to(dtype).to(device)
    reference.step(costs_B.tolist())
    check(state, reference, lagrange_step(state, costs_B, None, True, **RULE))


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_rank_and_every_number_of_ranks_has_the_same_bits(on_shards, device, ranks):
    generator = torch.Generator().manual_seed(3)
    batches = [
        (torch.randn(8, generator=generator).to(device), torch.rand(8, generator=generator).to(device) < 0.7)
        for _ in range(4)
    ]

    def train(rank, group):
        state = lagrange_state(0.7, 11, device)
        size = 1 if group is None else group.size()
        for costs_B, counted_B in batches:
            mean_1 = lagrange_step(state, costs_B[rank::size], counted_B[rank::size], True, **RULE, group=group)
        return *state, mean_1

    alone = train(0, None)
    for found in on_shards(ranks, train):
        for one, other in zip(found, alone, strict=True):
            assert torch.equal(one, other)
