import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_safe.algorithms import ppo

CLIP_RATIO = 0.2
CLIP_VALUE = 0.3


def masked_cells(mask):
    return [(b, t) for b, row in enumerate(mask) for t, inside in enumerate(row) if inside]


def policy_loss(log_prob, old_log_prob, advantage):
    ratio = math.exp(log_prob - old_log_prob)
    clipped = min(max(ratio, 1 - CLIP_RATIO), 1 + CLIP_RATIO)
    return -min(ratio * advantage, clipped * advantage)


def value_loss(value, old_value, target):
    clipped = min(max(value, old_value - CLIP_VALUE), old_value + CLIP_VALUE)
    return 0.5 * max((value - target) ** 2, (clipped - target) ** 2)


def reduced(loss, mask, mode, normalizer):
    """`loss` gives one cell's loss."""
    total = 0.0
    for b in range(len(mask)):
        row = [loss(b, t) for t in range(len(mask[b])) if mask[b][t]]
        if row:
            total += sum(row) / (len(row) if mode == "sequence" else 1)
    return total / normalizer


@pytest.mark.parametrize("mode", ["sequence", "token"])
@pytest.mark.parametrize(
    ("library", "scalar", "clip"),
    [(ppo.clipped_policy_loss_BT, policy_loss, CLIP_RATIO), (ppo.clipped_value_loss_BT, value_loss, CLIP_VALUE)],
    ids=["policy", "value"],
)
def test_loss_and_gradient_equal_the_loop(mask_BT, random_BT, numeric_gradient, library, scalar, clip, mode):
    x_BT = random_BT(mask_BT, 1).requires_grad_()
    old_BT, target_BT = random_BT(mask_BT, 2), random_BT(mask_BT, 3)
    mask, old, target = mask_BT.tolist(), old_BT.tolist(), target_BT.tolist()

    def expected(x) -> float:
        return reduced(lambda b, t: scalar(x[b][t], old[b][t], target[b][t]), mask, mode, 7)

    loss = ppo.reduce_loss(library(x_BT, old_BT, target_BT, clip), mask_BT, mode, 7)
    assert loss.item() == pytest.approx(expected(x_BT.tolist()), abs=1e-12)
    loss.backward()
    torch.testing.assert_close(x_BT.grad, numeric_gradient(expected, x_BT), atol=1e-8, rtol=1e-6)
    assert (x_BT.grad[~mask_BT] == 0).all()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        # Slope: d loss / d log π. Clipping only ever removes the incentive to move further away.
        (1.5, 2.0, -2.4, 0.0),
        (0.5, -2.0, 1.6, 0.0),
        (1.5, -2.0, 3.0, 3.0),
        (0.5, 2.0, -1.0, -1.0),
        (1.1, 2.0, -2.2, -2.2),
        (0.9, -2.0, 1.8, 1.8),
    ],
)
def test_policy_clipping_on_both_sides(ratio, advantage, loss, slope):
    log_prob = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    advantage_BT = torch.tensor([[advantage]], dtype=torch.float64)
    found_BT = ppo.clipped_policy_loss_BT(log_prob, torch.zeros_like(log_prob), advantage_BT, CLIP_RATIO)
    assert found_BT.item() == pytest.approx(loss)
    found_BT.sum().backward()
    assert log_prob.grad.item() == pytest.approx(slope)


@pytest.mark.parametrize(
    ("value", "target", "loss", "slope"),
    [
        # The old value is 0. No gradient once past the clip towards the target; past it away from the target, there is.
        (0.5, 2.0, 0.5 * 1.7**2, 0.0),
        (-0.5, -2.0, 0.5 * 1.7**2, 0.0),
        (0.5, -1.0, 0.5 * 1.5**2, 1.5),
        (-0.5, 1.0, 0.5 * 1.5**2, -1.5),
        (0.1, 1.0, 0.5 * 0.9**2, -0.9),
    ],
)
def test_value_clipping_on_both_sides(value, target, loss, slope):
    value_BT = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
    target_BT = torch.tensor([[target]], dtype=torch.float64)
    found_BT = ppo.clipped_value_loss_BT(value_BT, torch.zeros_like(value_BT), target_BT, CLIP_VALUE)
    assert found_BT.item() == pytest.approx(loss)
    found_BT.sum().backward()
    assert value_BT.grad.item() == pytest.approx(slope)


@pytest.mark.parametrize("mode", ["sequence", "token"])
def test_micro_batches_add_up_to_the_whole_batch(random_BT, mask_from_spans, mode):
    mask_BT = mask_from_spans(6, [(0, 6), (2, 3), (5, 1), (3, 0), (1, 5)])
    loss_BT = random_BT(mask_BT, 1, junk=math.nan)
    normalizer = {"sequence": 5, "token": int(mask_BT.sum())}[mode]
    whole = ppo.reduce_loss(loss_BT, mask_BT, mode, normalizer)
    parts = sum(ppo.reduce_loss(loss_BT[rows], mask_BT[rows], mode, normalizer) for rows in ([0, 3], [1], [2, 4]))
    torch.testing.assert_close(whole, parts)
    assert whole.item() != 0
    if mode == "token":
        torch.testing.assert_close(whole, loss_BT[mask_BT].mean())


def test_a_batch_without_any_action_token_has_no_loss_and_no_gradient():
    mask_BT = torch.zeros(2, 3, dtype=torch.bool)
    loss_BT = torch.ones(2, 3, requires_grad=True)
    loss = ppo.reduce_loss(loss_BT, mask_BT, "token", 0)
    loss.backward()
    assert loss.item() == 0
    assert loss_BT.grad.tolist() == [[0, 0, 0]] * 2


def test_an_unknown_mode_is_named():
    with pytest.raises(ValueError, match="mode must be 'sequence' or 'token', found 'batch'"):
        ppo.reduce_loss(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool), "batch", 1)


@pytest.mark.parametrize("lam", [0.0, 0.5, 3.0])
def test_mix_and_its_gradient(mask_BT, random_BT, lam):
    reward_BT, cost_BT = random_BT(mask_BT, 1).requires_grad_(), random_BT(mask_BT, 2).requires_grad_()
    for multiplier in (lam, torch.tensor(lam, dtype=torch.float64)):
        mixed_BT = ppo.mix_advantages(reward_BT, cost_BT, multiplier)
        expected = [
            [(r - lam * c) / (1 + lam) for r, c in zip(*rows, strict=True)]
            for rows in zip(reward_BT.tolist(), cost_BT.tolist(), strict=True)
        ]
        torch.testing.assert_close(mixed_BT, torch.tensor(expected, dtype=torch.float64))
    slope_reward_BT, slope_cost_BT = torch.autograd.grad(mixed_BT.sum(), (reward_BT, cost_BT))
    torch.testing.assert_close(slope_reward_BT, torch.full_like(reward_BT, 1 / (1 + lam)))
    torch.testing.assert_close(slope_cost_BT, torch.full_like(cost_BT, -lam / (1 + lam)))


@given(st.floats(-100, 100), st.floats(-100, 100), st.floats(0, 1e6))
def test_the_mix_lies_between_the_reward_and_minus_the_cost(reward, cost, lam):
    reward_t, cost_t = torch.tensor(reward, dtype=torch.float64), torch.tensor(cost, dtype=torch.float64)
    assert ppo.mix_advantages(reward_t, cost_t, 0.0).item() == reward
    mixed = ppo.mix_advantages(reward_t, cost_t, lam).item()
    assert min(reward, -cost) - 1e-9 <= mixed <= max(reward, -cost) + 1e-9


@pytest.mark.parametrize("junk", [None, math.nan, math.inf])
def test_policy_statistics_equal_the_loop(mask_BT, random_BT, junk):
    log_probs_BT = random_BT(mask_BT, 1, scale=0.3, junk=junk)
    old_log_probs_BT = random_BT(mask_BT, 2, scale=0.3, junk=junk)
    cells = masked_cells(mask_BT.tolist())
    ratios = [math.exp(log_probs_BT[cell].item() - old_log_probs_BT[cell].item()) for cell in cells]
    found = ppo.policy_statistics(log_probs_BT, old_log_probs_BT, mask_BT, CLIP_RATIO)
    assert {name: x.item() for name, x in found.items()} == {
        "clipped": sum(ratio < 1 - CLIP_RATIO or ratio > 1 + CLIP_RATIO for ratio in ratios),
        "approximate_kl": pytest.approx(sum(ratio - 1 - math.log(ratio) for ratio in ratios)),
        "tokens": len(cells),
    }


def test_clipped_tokens_are_counted_on_both_sides():
    log_probs_BT = torch.tensor([[0.7, 0.9, 1.0, 1.1, 1.3, 9.0]]).log()
    mask_BT = torch.tensor([[True] * 5 + [False]])
    found = ppo.policy_statistics(log_probs_BT, torch.zeros_like(log_probs_BT), mask_BT, CLIP_RATIO)
    assert (found["clipped"].item(), found["tokens"].item()) == (2, 5)


@given(st.floats(-3, 3))
def test_the_kl_estimate_is_never_negative(log_ratio):
    x_BT = torch.tensor([[log_ratio]], dtype=torch.float64)
    found = ppo.policy_statistics(x_BT, torch.zeros_like(x_BT), torch.tensor([[True]]), CLIP_RATIO)
    assert found["approximate_kl"].item() >= 0


@pytest.mark.parametrize("junk", [None, math.nan])
def test_moments_and_whitening_equal_the_loop(mask_BT, random_BT, junk):
    x_BT = random_BT(mask_BT, 1, scale=3.0, junk=junk) + 5
    inside = [x_BT[cell].item() for cell in masked_cells(mask_BT.tolist())]
    total, squares, count = (moment.item() for moment in ppo.masked_moments(x_BT, mask_BT))
    assert total == pytest.approx(sum(inside))
    assert squares == pytest.approx(sum(x * x for x in inside))
    assert count == len(inside)

    expected = [
        [(x - 4.5) / math.sqrt(8.5 + 1e-8) if inside else 0.0 for x, inside in zip(*rows, strict=True)]
        for rows in zip(x_BT.tolist(), mask_BT.tolist(), strict=True)
    ]
    whitened_BT = ppo.whiten(x_BT, mask_BT, 4.5, 8.5)
    torch.testing.assert_close(whitened_BT, torch.tensor(expected, dtype=torch.float64))
    assert (whitened_BT[~mask_BT] == 0).all()


def test_moments_of_parts_whiten_the_whole_even_far_from_zero(random_BT, mask_from_spans):
    mask_BT = mask_from_spans(6, [(0, 6), (2, 3), (5, 1), (3, 0), (1, 5)])
    x_BT = (random_BT(mask_BT, 1) + 1000).float()
    parts = [torch.stack(ppo.masked_moments(x_BT[rows], mask_BT[rows])) for rows in ([0, 1], [2, 3, 4])]
    total, squares, count = sum(parts)
    mean = total / count
    whitened_BT = ppo.whiten(x_BT, mask_BT, mean, squares / count - mean**2)
    assert whitened_BT.dtype == torch.float32
    inside = whitened_BT[mask_BT]
    assert inside.mean().item() == pytest.approx(0, abs=1e-5)
    assert inside.std(unbiased=False).item() == pytest.approx(1, abs=1e-5)


def test_whitening_one_token_gives_zero_not_nan():
    mask_BT = torch.tensor([[False, True]])
    assert ppo.whiten(torch.tensor([[4.0, 7.0]]), mask_BT, 7.0, -1e-6).tolist() == [[0, 0]]
