import json
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_safe.algorithms.lagrange import LagrangeMultiplier

SETTINGS = {
    "lambda_init": 1.0,
    "lambda_max": 5.0,
    "lambda_lr": 0.1,
    "threshold": -0.5,
    "update_delay_steps": 0,
    "window": 4,
}


def multiplier(**changes) -> LagrangeMultiplier:
    return LagrangeMultiplier(**{**SETTINGS, **changes})


def reference(batches, lambda_init, lambda_max, lambda_lr, threshold, update_delay_steps, window, lambda_min):
    """λ after each batch, in log space as the paper writes it."""
    log_lambda, seen, trace = math.log(lambda_init), [], []
    for step, batch in enumerate(batches):
        seen = (seen + batch)[-window:]
        if seen and step >= update_delay_steps:
            log_lambda += lambda_lr * math.exp(log_lambda) * (sum(seen) / len(seen) - threshold)
            log_lambda = min(max(log_lambda, math.log(lambda_min)), math.log(lambda_max))
        trace.append(math.exp(log_lambda))
    return trace


@pytest.mark.parametrize("lambda_lr", [0.04, 1.0])
@pytest.mark.parametrize(("window", "update_delay_steps"), [(1, 0), (4, 3), (100, 0)])
def test_equals_the_loop(window, update_delay_steps, lambda_lr):
    rng = random.Random(0)
    settings = {
        **SETTINGS,
        "window": window,
        "update_delay_steps": update_delay_steps,
        "lambda_lr": lambda_lr,
        "lambda_min": 0.05,
    }
    batches = [[rng.gauss(3 if step < 15 else -8, 2) for _ in range(3 * (step != 4))] for step in range(60)]
    lagrange, trace = LagrangeMultiplier(**settings), []
    for step, batch in enumerate(batches):
        lagrange.observe(batch)
        lagrange.update(step)
        trace.append(lagrange.value)
    assert trace == pytest.approx(reference(batches, **settings))
    if lambda_lr == 1.0:  # so that both bounds are seen to bind
        assert (max(trace), min(trace)) == (5.0, 0.05)


def test_a_step_is_sgd_on_log_lambda():
    """As in the authors' code: gradient descent of -(J_C - threshold) exp(ln λ) with learning rate α."""
    log_lambda = torch.tensor(math.log(0.7), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([log_lambda], lr=0.1)
    lagrange = multiplier(lambda_init=0.7)
    lagrange.observe([2.0, -1.0, 0.5])
    for step in range(5):
        optimizer.zero_grad()
        (-(0.5 - -0.5) * log_lambda.exp()).backward()
        optimizer.step()
        lagrange.update(step)
        assert lagrange.value == pytest.approx(log_lambda.exp().item(), rel=1e-12)


def test_nothing_moves_before_the_delay_or_without_episodes():
    lagrange = multiplier(update_delay_steps=3)
    assert lagrange.mean_episode_cost is None
    lagrange.update(10)
    lagrange.observe([4.0])
    lagrange.update(2)
    assert lagrange.value == 1.0
    lagrange.update(3)
    assert lagrange.value == pytest.approx(math.exp(0.1 * 4.5))


def test_the_window_forgets_the_oldest():
    lagrange = multiplier(window=3)
    lagrange.observe([100.0, 1.0])
    lagrange.observe([2.0, 6.0])
    assert lagrange.mean_episode_cost == 3.0
    lagrange.observe([])
    assert lagrange.mean_episode_cost == 3.0
    lagrange.observe([100.0, 4.0, 5.0, 9.0])
    assert lagrange.mean_episode_cost == 6.0


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.randoms())
def test_mean_episode_cost_ignores_the_order_of_ranks(costs, rng):
    shuffled = rng.sample(costs, len(costs))
    means = []
    for order in (costs, shuffled):
        lagrange = multiplier(window=30)
        lagrange.observe(order)
        means.append(lagrange.mean_episode_cost)
    assert means[0] == means[1]


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=20), st.floats(0, 100))
def test_lambda_stays_within_its_bounds_and_moves_with_the_violation(costs, lambda_lr):
    lagrange = multiplier(lambda_lr=lambda_lr)
    for step, cost in enumerate(costs):
        before = lagrange.value
        lagrange.observe([cost])
        lagrange.update(step)
        assert 0.01 <= lagrange.value <= 5.0
        assert (lagrange.value - before) * (lagrange.mean_episode_cost - lagrange.threshold) >= 0


@pytest.mark.parametrize("bound", [0.1, 0.3, 5.0, 10.0, 7.3])
def test_the_bounds_are_exact_and_are_left_again(bound):
    """No rounding error at a bound, and no winding up beyond it."""
    at_top = multiplier(lambda_init=bound, lambda_max=bound, lambda_min=bound / 10)
    at_bottom = multiplier(lambda_init=bound, lambda_max=bound * 10, lambda_min=bound)
    for lagrange, push in ((at_top, 100.0), (at_bottom, -100.0)):
        lagrange.observe([push] * 4)
        for step in range(50):
            lagrange.update(step)
        assert lagrange.value == bound
        lagrange.observe([-push] * 4)
        lagrange.update(50)
        assert lagrange.value != bound


def test_a_decayed_lambda_comes_back_as_slowly_as_the_docstring_says():
    lagrange = multiplier(lambda_init=0.01, lambda_lr=0.1, threshold=0.0)
    lagrange.observe([1.0])
    steps = 0
    while lagrange.value < 0.1:
        lagrange.update(steps)
        steps += 1
    assert steps == pytest.approx((1 / 0.01 - 1 / 0.1) / 0.1, rel=0.02)


@given(st.lists(st.lists(st.floats(-50, 50), max_size=5), max_size=12), st.integers(0, 12))
def test_stop_and_resume_through_json_is_exact(batches, stop):
    straight = multiplier()
    first = multiplier()
    for step, batch in enumerate(batches):
        if step == stop:
            state = json.loads(json.dumps(first.state_dict()))
            first = multiplier()
            first.load_state_dict(state)
            assert first.state_dict() == straight.state_dict()
        for lagrange in (straight, first):
            lagrange.observe(batch)
            lagrange.update(step)
        assert first.value == straight.value
        assert first.mean_episode_cost == straight.mean_episode_cost


def test_loading_replaces_what_was_there():
    source, target = multiplier(), multiplier(lambda_init=2.0)
    source.observe([1.0])
    target.observe([7.0, 8.0])
    target.load_state_dict(source.state_dict())
    assert (target.value, target.mean_episode_cost) == (1.0, 1.0)


def test_a_state_is_cut_to_changed_settings():
    lagrange = multiplier(lambda_init=4.0)
    lagrange.observe([1.0, 2.0, 3.0])
    smaller = multiplier(lambda_max=2.0, window=2)
    smaller.load_state_dict(lagrange.state_dict())
    assert (smaller.value, smaller.mean_episode_cost) == (2.0, 2.5)


@pytest.mark.parametrize(
    "state",
    [{"lambda": math.nan, "episode_costs": []}, {"lambda": 0.1, "episode_costs": [1.0, math.inf]}],
)
def test_a_state_that_is_not_finite_is_refused_and_changes_nothing(state):
    lagrange = multiplier()
    lagrange.observe([1.0])
    before = lagrange.state_dict()
    with pytest.raises(ValueError, match="finite"):
        lagrange.load_state_dict(state)
    assert lagrange.state_dict() == before


@pytest.mark.parametrize(
    ("field", "number"),
    [
        ("lambda_init", 0.0),
        ("lambda_init", -1.0),
        ("lambda_init", math.nan),
        ("lambda_max", 0.5),
        ("lambda_max", math.inf),
        ("lambda_lr", -0.1),
        ("threshold", math.nan),
        ("update_delay_steps", -1),
        ("window", 0),
        ("lambda_min", 0.0),
        ("lambda_min", -1.0),
    ],
)
def test_a_bad_setting_is_named(field, number):
    with pytest.raises(ValueError, match=f"^{field} must be .*found {number}$"):
        multiplier(**{field: number})


def test_a_cost_that_is_not_finite_is_named_and_not_kept():
    lagrange = multiplier()
    lagrange.observe([1.0])
    with pytest.raises(ValueError, match=r"episode_costs\[1\] must be finite, found nan"):
        lagrange.observe([2.0, math.nan])
    assert lagrange.mean_episode_cost == 1.0
