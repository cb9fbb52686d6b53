import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_safe.algorithms.preference import cost_loss_B, reward_loss_B

score = st.floats(-20, 20)
sign = st.sampled_from([-1, 0, 1])


def random_scores(size: int, seed: int) -> torch.Tensor:
    return 2 * torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def numeric_gradient(function: Callable[[list], float], x: torch.Tensor) -> torch.Tensor:
    """Central differences of a function of nested lists."""
    step = 1e-6
    gradient = torch.zeros_like(x)
    for index in range(x.numel()):
        shifted = []
        for sign in (1, -1):
            moved = x.detach().clone()
            moved.view(-1)[index] += sign * step
            shifted.append(function(moved.tolist()))
        gradient.view(-1)[index] = (shifted[0] - shifted[1]) / (2 * step)
    return gradient


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def reward_reference(better: float, worse: float, l2: float) -> float:
    return -log_sigmoid(better - worse) + l2 * (better**2 + worse**2) / 2


def cost_reference(unsafer: float, safer: float, unsafer_sign: int, safer_sign: int, l2: float) -> float:
    ranking = -log_sigmoid(unsafer - safer)
    labelled = [(sign, cost) for sign, cost in ((unsafer_sign, unsafer), (safer_sign, safer)) if sign != 0]
    classification = -sum(log_sigmoid(-sign * cost) for sign, cost in labelled)
    return ranking + classification + l2 * (unsafer**2 + safer**2) / 2


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("l2", [0.0, 0.3])
def test_reward_loss_and_gradient(size, l2):
    better_B, worse_B = random_scores(size, 1).requires_grad_(), random_scores(size, 2).requires_grad_()
    loss_B = reward_loss_B(better_B, worse_B, l2)
    pairs = list(zip(better_B.tolist(), worse_B.tolist(), strict=True))
    assert loss_B.tolist() == pytest.approx([reward_reference(better, worse, l2) for better, worse in pairs])

    def total(scores: list[list[float]]) -> float:
        return sum(reward_reference(better, worse, l2) for better, worse in zip(*scores, strict=True))

    loss_B.sum().backward()
    expected = numeric_gradient(total, torch.stack([better_B, worse_B]))
    torch.testing.assert_close(torch.stack([better_B.grad, worse_B.grad]), expected, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("size", [1, 12])
@pytest.mark.parametrize("l2", [0.0, 0.3])
def test_cost_loss_and_gradient(size, l2):
    unsafer_B, safer_B = random_scores(size, 3).requires_grad_(), random_scores(size, 4).requires_grad_()
    signs = [(-1, 1), (-1, -1), (1, 1), (-1, 1), (1, 1), (-1, -1), (-1, 1), (1, -1)]
    signs = [*signs, (0, 1), (0, 0), (-1, 0), (0, -1)][:size]
    unsafer_sign_B, safer_sign_B = torch.tensor(signs).T
    loss_B = cost_loss_B(unsafer_B, safer_B, unsafer_sign_B, safer_sign_B, l2)

    def per_pair(scores: list[list[float]]) -> list[float]:
        pairs = zip(*scores, signs, strict=True)
        return [cost_reference(unsafer, safer, *pair_signs, l2) for unsafer, safer, pair_signs in pairs]

    scores = torch.stack([unsafer_B, safer_B])
    assert loss_B.tolist() == pytest.approx(per_pair(scores.tolist()))
    loss_B.sum().backward()
    expected = numeric_gradient(lambda lists: sum(per_pair(lists)), scores)
    torch.testing.assert_close(torch.stack([unsafer_B.grad, safer_B.grad]), expected, atol=1e-7, rtol=1e-6)


def test_cost_loss_pulls_an_unsafe_answer_up_and_a_safe_one_down():
    zero_B = torch.zeros(1, dtype=torch.float64)
    unsafer_B, safer_B = zero_B.clone().requires_grad_(), zero_B.clone().requires_grad_()
    cost_loss_B(unsafer_B, safer_B, torch.tensor([-1]), torch.tensor([1]), 0.0).sum().backward()
    # Ranking and sign each give half a unit at a score of zero.
    assert unsafer_B.grad.item() == pytest.approx(-1.0)
    assert safer_B.grad.item() == pytest.approx(1.0)


def test_a_sign_that_nobody_gave_leaves_the_ranking_alone():
    unsafer_B, safer_B = random_scores(6, 5).requires_grad_(), random_scores(6, 6).requires_grad_()
    nobody_B = torch.zeros(6)
    cost = torch.autograd.grad(cost_loss_B(unsafer_B, safer_B, nobody_B, nobody_B, 0.2).sum(), (unsafer_B, safer_B))
    ranking = torch.autograd.grad(reward_loss_B(unsafer_B, safer_B, 0.2).sum(), (unsafer_B, safer_B))
    assert all(torch.equal(one, other) for one, other in zip(cost, ranking, strict=True))


@pytest.mark.parametrize("gap", [1e4, -1e4])
def test_losses_are_finite_at_extreme_scores_in_float32(gap):
    better_B, worse_B = torch.tensor([gap], requires_grad=True), torch.tensor([-gap], requires_grad=True)
    loss_B = reward_loss_B(better_B, worse_B, 0.0)
    assert loss_B.item() == max(0.0, -2 * gap)
    loss_B.sum().backward()
    assert better_B.grad.item() == (0.0 if gap > 0 else -1.0)
    cost_B = cost_loss_B(better_B, worse_B, torch.tensor([-1]), torch.tensor([1]), 0.0)
    assert cost_B.item() == (0.0 if gap > 0 else -4 * gap)


@given(score, score, st.floats(-10, 10))
def test_reward_loss_depends_on_the_difference_only(better, worse, shift):
    a, b = (
        reward_loss_B(torch.tensor([better + s]).double(), torch.tensor([worse + s]).double(), 0.0)
        for s in (0.0, shift)
    )
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)  # float32 rounding of the scores themselves


@given(score, score, sign, sign)
def test_swapping_the_roles_of_safe_and_unsafe_mirrors_the_cost_loss(unsafer, safer, unsafer_sign, safer_sign):
    """Negating all costs, exchanging the pair and flipping the signs tells the same story about harmlessness."""
    u, s = torch.tensor([unsafer], dtype=torch.float64), torch.tensor([safer], dtype=torch.float64)
    us, ss = torch.tensor([unsafer_sign]), torch.tensor([safer_sign])
    torch.testing.assert_close(cost_loss_B(u, s, us, ss, 0.1), cost_loss_B(-s, -u, -ss, -us, 0.1))
    assert cost_loss_B(u, s, us, ss, 0.0).item() >= math.log1p(math.exp(-abs(unsafer - safer))) - 1e-12
