import json
import math
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_safe.algorithms.lagrange import LagrangeMultiplier
from megatron_safe.kernels.backend import interpreted, set_backend

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


def costs_B(costs: list[float]) -> torch.Tensor:
    return torch.tensor(costs, dtype=torch.float64)


def bits(lagrange: LagrangeMultiplier) -> list[int]:
    """Of λ and J_C, a NaN too."""
    return [x.view(torch.int64).item() for x in (lagrange.value, lagrange.mean_episode_cost)]


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
        lagrange.step(step, costs_B(batch))
        trace.append(lagrange.value.item())
    assert trace == pytest.approx(reference(batches, **settings))
    if lambda_lr == 1.0:  # so that both bounds are seen to bind
        assert (max(trace), min(trace)) == (5.0, 0.05)


def test_a_step_is_sgd_on_log_lambda():
    """As in the authors' code: gradient descent of -(J_C - threshold) exp(ln λ) with learning rate α."""
    log_lambda = torch.tensor(math.log(0.7), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([log_lambda], lr=0.1)
    lagrange = multiplier(lambda_init=0.7, window=3)
    for step in range(5):
        optimizer.zero_grad()
        (-(0.5 - -0.5) * log_lambda.exp()).backward()
        optimizer.step()
        lagrange.step(step, costs_B([2.0, -1.0, 0.5]))
        assert lagrange.value.item() == pytest.approx(log_lambda.exp().item(), rel=1e-12)


def test_nothing_moves_before_the_delay_or_without_episodes():
    lagrange = multiplier(update_delay_steps=3)
    assert lagrange.mean_episode_cost.isnan()
    lagrange.step(10, costs_B([]))
    lagrange.step(10, costs_B([math.nan, 4.0]), counted_B=torch.tensor([True, False]))
    assert lagrange.mean_episode_cost.isnan() and lagrange.value.item() == 1.0
    lagrange.step(2, costs_B([4.0]))
    lagrange.step(3, costs_B([4.0]), move=False)
    assert lagrange.value.item() == 1.0 and lagrange.mean_episode_cost.item() == 4.0
    lagrange.step(3, costs_B([]))
    assert lagrange.value.item() == pytest.approx(math.exp(0.1 * 4.5))


def test_the_window_forgets_the_oldest():
    lagrange = multiplier(window=3)
    lagrange.step(0, costs_B([100.0, 1.0]))
    lagrange.step(1, costs_B([2.0, 6.0]))
    assert lagrange.mean_episode_cost.item() == 3.0
    lagrange.step(2, costs_B([]))
    assert lagrange.mean_episode_cost.item() == 3.0
    lagrange.step(3, costs_B([100.0, 4.0, math.inf, 5.0, 9.0]))
    assert lagrange.mean_episode_cost.item() == 6.0


def test_what_was_read_stays():
    """0-d fp64 each; a step changes the multiplier, not the numbers that were taken from it."""
    lagrange = multiplier()
    lagrange.step(0, costs_B([4.0]))
    value, mean = lagrange.value, lagrange.mean_episode_cost
    before = value.item(), mean.item()
    lagrange.step(1, costs_B([-9.0]))
    assert (value.item(), mean.item()) == before != (lagrange.value.item(), lagrange.mean_episode_cost.item())
    assert {(x.shape, x.dtype) for x in (value, mean)} == {((), torch.float64)}


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=20), st.floats(0, 100))
def test_lambda_stays_within_its_bounds_and_moves_with_the_violation(costs, lambda_lr):
    lagrange = multiplier(lambda_lr=lambda_lr)
    for step, cost in enumerate(costs):
        before = lagrange.value
        lagrange.step(step, costs_B([cost]))
        assert 0.01 <= lagrange.value <= 5.0
        assert (lagrange.value - before) * (lagrange.mean_episode_cost - SETTINGS["threshold"]) >= 0


@pytest.mark.parametrize("bound", [0.1, 0.3, 5.0, 10.0, 7.3])
def test_the_bounds_are_exact_and_are_left_again(bound):
    """No rounding error at a bound, and no winding up beyond it."""
    at_top = multiplier(lambda_init=bound, lambda_max=bound, lambda_min=bound / 10)
    at_bottom = multiplier(lambda_init=bound, lambda_max=bound * 10, lambda_min=bound)
    for lagrange, push in ((at_top, 100.0), (at_bottom, -100.0)):
        for step in range(50):
            lagrange.step(step, costs_B([push] * 4))
        assert lagrange.value.item() == bound
        lagrange.step(50, costs_B([-push] * 4))
        assert lagrange.value.item() != bound


def test_a_decayed_lambda_comes_back_as_slowly_as_the_docstring_says():
    lagrange = multiplier(lambda_init=0.01, lambda_lr=0.1, threshold=0.0)
    steps = 0
    while lagrange.value < 0.1:
        lagrange.step(steps, costs_B([1.0]))
        steps += 1
    assert steps == pytest.approx((1 / 0.01 - 1 / 0.1) / 0.1, rel=0.02)


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    if request.param == "triton" and not interpreted():
        pytest.skip("Triton's interpreter does not run here")
    set_backend(request.param)
    yield
    set_backend("auto")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches=st.lists(st.lists(st.floats(-50, 50), max_size=5), max_size=12), stop=st.integers(0, 12))
def test_stop_and_resume_through_json_is_exact(backend, batches, stop):
    straight, first = multiplier(), multiplier()
    for step, batch in enumerate(batches):
        if step == stop:
            state = json.loads(json.dumps(first.state_dict()))
            first = multiplier()
            first.load_state_dict(state)
            assert first.state_dict() == straight.state_dict()
            assert bits(first) == bits(straight)
        for lagrange in (straight, first):
            lagrange.step(step, costs_B(batch))
        assert bits(first) == bits(straight)


def test_loading_replaces_what_was_there():
    source, target = multiplier(), multiplier(lambda_init=2.0)
    source.step(0, costs_B([1.0]), move=False)
    target.step(0, costs_B([7.0, 8.0]))
    target.load_state_dict(source.state_dict())
    assert target.state_dict() == source.state_dict() == {"lambda": 1.0, "episode_costs": [1.0], "episodes": 1}
    target.step(1, costs_B([2.0, 6.0]))
    assert target.mean_episode_cost.item() == 3.0


def test_a_state_of_before_the_count_of_episodes_loads():
    for costs in ([], [1.0, 2.0], [1.0, 2.0, 6.0, 7.0]):
        lagrange = multiplier()
        lagrange.load_state_dict({"lambda": 0.5, "episode_costs": costs})
        assert lagrange.state_dict() == {"lambda": 0.5, "episode_costs": costs, "episodes": len(costs)}
        lagrange.step(0, costs_B([9.0]))
        assert lagrange.state_dict()["episode_costs"] == [*costs, 9.0][-4:]


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("episodes", [0, 2, 3, 4, 7])
def test_a_state_is_cut_to_changed_settings(window, episodes):
    costs = [float(i * i) for i in range(episodes)]
    before, after = multiplier(lambda_init=4.0), multiplier(lambda_max=2.0, window=window)
    before.step(0, costs_B(costs), move=False)
    after.load_state_dict(before.state_dict())
    assert after.value.item() == 2.0
    kept = costs[-4:][-window:]
    assert after.state_dict()["episode_costs"] == kept
    assert after.mean_episode_cost.item() == pytest.approx(sum(kept) / len(kept) if kept else math.nan, nan_ok=True)
    after.step(0, costs_B([-5.0]), move=False)
    assert after.state_dict()["episode_costs"] == [*kept, -5.0][-window:]


@pytest.mark.parametrize(
    "state",
    [{"lambda": math.nan, "episode_costs": []}, {"lambda": 0.1, "episode_costs": [1.0, math.inf]}],
)
def test_a_state_that_is_not_finite_is_refused_and_changes_nothing(state):
    lagrange = multiplier()
    lagrange.step(0, costs_B([1.0]))
    before = lagrange.state_dict()
    with pytest.raises(ValueError, match="finite"):
        lagrange.load_state_dict(state)
    with pytest.raises(KeyError):
        lagrange.load_state_dict({"lambda": 0.1})
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
