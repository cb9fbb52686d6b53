"""What must hold of the kernels whatever their formulas look like: worked examples, invariances, and sums of parts.

Legend: B sequences, T actions, N tokens.
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_safe.kernels.ppo_lag_loss import STATISTICS, ppo_lag_loss, token_weights
from megatron_safe.kernels.shaped_gae import mixed_moments, shaped_gae
from megatron_safe.kernels.value_loss import value_loss

CLIP = 0.2
SPANS = [(0, 6), (2, 3), (5, 1), (3, 0), (1, 5)]
few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
rows = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=4)
seeds = st.integers(0, 10_000)
unit = st.floats(0, 1, width=32)


def mask_from(spans, columns, device):
    """spans: (first, number) of each row's action tokens."""
    return torch.tensor([[a <= t < a + n for t in range(columns)] for a, n in spans], device=device)


def normal(*size, seed, device):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(device)


def batch(spans, columns, seed, device, kl_coeff=0.1, score_clip=3.0, gamma=0.99, lam=0.95):
    """Arguments of `shaped_gae`."""
    names = ("log_probs_BT", "ref_log_probs_BT", "reward_values_BT", "cost_values_BT")
    inputs = {name: normal(len(spans), columns, seed=seed + i, device=device) for i, name in enumerate(names)}
    inputs["rewards_B"], inputs["costs_B"] = 2 * normal(2, len(spans), seed=seed + 4, device=device)
    inputs["mask_BT"] = mask_from(spans, columns, device)
    return inputs | dict(kl_coeff=kl_coeff, score_clip=score_clip, gamma=gamma, lam=lam)


def policy_loss(log_ratio_N, reward_N, cost_N, weights_N, lam, mask_N=None, **moments):
    """(loss, statistics, d loss / d log π) of `ppo_lag_loss` where each token has the given log ρ."""
    # Two tokens of probability 1/2 each: a log-probability moves by half of what its logit does.
    logits_N2 = log_ratio_N.new_zeros(len(log_ratio_N), 2).requires_grad_()
    targets_N = torch.zeros_like(log_ratio_N, dtype=torch.int64)
    mask_N = torch.ones_like(log_ratio_N, dtype=torch.bool) if mask_N is None else mask_N
    loss, statistics_4 = ppo_lag_loss(
        logits_N2, targets_N, -math.log(2) - log_ratio_N, reward_N, cost_N, mask_N, weights_N,
        log_ratio_N.new_tensor(lam, dtype=torch.float64), CLIP, **moments,
    )  # fmt: skip
    loss.backward()
    return loss.detach(), dict(zip(STATISTICS, statistics_4.tolist(), strict=True)), 2 * logits_N2.grad[:, 0]


def mixed(reward_N, cost_N, lam, **moments):
    """The advantage that the loss takes, from its slope at ρ = 1, which is -Â."""
    ones_N = torch.ones_like(reward_N)
    return -policy_loss(torch.zeros_like(reward_N), reward_N, cost_N, ones_N, lam, **moments)[2]


# Token rewards and costs.


def test_clips_both_scores_on_both_sides(device):
    """With γ = 0 and no values an advantage is its token's reward or cost. KL 9 and -9, then R = ±7 and C = ∓8."""
    zero_BT = torch.zeros(2, 3, device=device)
    log_probs_BT = torch.tensor([[0.0, 9.0, 0.0], [0.0, -9.0, 0.0]], device=device)
    rewards_B, costs_B = (torch.tensor(x, device=device) for x in ([7.0, -7.0], [-8.0, 8.0]))
    mask_BT = mask_from([(1, 2), (1, 2)], 3, device)
    found = shaped_gae(log_probs_BT, zero_BT, rewards_B, costs_B, zero_BT, zero_BT, mask_BT, 1.0, 5.0, 0.0, 0.9)
    assert found.reward_advantages_BT.tolist() == [[0, -5, 5], [0, 5, -5]]
    assert found.cost_advantages_BT.tolist() == [[0, 5, -5], [0, -5, 5]]


@few
@given(spans=rows, seed=seeds, lam=st.floats(0, 100), beta=st.floats(0.001, 1))
def test_the_mix_carries_exactly_beta_for_every_lambda(device, spans, seed, lam, beta):
    """The reward's -β k_t and the cost's +β k_t mix to -β k_t: a moving λ never loosens the tie to the reference model.

    (The paper's β / 2 in both gives β / 2; the identity ends where a score is clipped.)
    """
    inputs = batch(spans, 7, seed, device, kl_coeff=beta, score_clip=1e9, gamma=0.0)
    for name in ("rewards_B", "costs_B", "reward_values_BT", "cost_values_BT"):
        inputs[name].zero_()
    found, mask_BT = shaped_gae(**inputs), inputs["mask_BT"]
    mixed_N = mixed(found.reward_advantages_BT.flatten(), found.cost_advantages_BT.flatten(), lam)
    kl_BT = (inputs["log_probs_BT"] - inputs["ref_log_probs_BT"]).double()
    expected_BT = torch.where(mask_BT, -beta * kl_BT, 0.0).float()
    torch.testing.assert_close(mixed_N.view_as(mask_BT), expected_BT, atol=1e-6, rtol=1e-5)


def test_the_score_of_a_row_without_response_goes_nowhere(device):
    inputs = batch([(1, 4), (2, 0), (0, 3)], 6, 0, device)
    kept = [0, 2]
    alone = shaped_gae(**{name: x[kept] if isinstance(x, torch.Tensor) else x for name, x in inputs.items()})
    inputs["rewards_B"][1] = inputs["costs_B"][1] = math.nan
    found = shaped_gae(**inputs)
    for x_BT, alone_BT in zip(found[:4], alone[:4], strict=True):
        assert (x_BT[1] == 0).all() and torch.equal(x_BT[kept], alone_BT)
    torch.testing.assert_close(found.sums_6, alone.sums_6)


# Advantages.


@few
@given(spans=rows, seed=seeds, gamma=unit)
def test_with_lambda_1_a_return_is_the_discounted_sum_of_rewards(device, spans, seed, gamma):
    """Whatever the critic says: it only decides how much of the return is an advantage."""
    inputs = batch(spans, 8, seed, device, gamma=gamma, lam=1.0)
    found = shaped_gae(**inputs)
    mask = inputs["mask_BT"].tolist()
    kl = (inputs["log_probs_BT"].double() - inputs["ref_log_probs_BT"].double()).tolist()
    kinds = (
        ("rewards_B", -1, "reward_values_BT", found.reward_advantages_BT, found.reward_returns_BT),
        ("costs_B", 1, "cost_values_BT", found.cost_advantages_BT, found.cost_returns_BT),
    )
    for score, sign, values, advantages_BT, returns_BT in kinds:
        expected_BT = torch.zeros(len(spans), 8, dtype=torch.float64)
        for b, score_b in enumerate(inputs[score].tolist()):
            columns = [t for t in range(8) if mask[b][t]]
            tokens = [sign * 0.1 * kl[b][t] + score_b * (t == columns[-1]) for t in columns]
            tokens = [min(max(x, -3.0), 3.0) for x in tokens]
            for i, t in enumerate(columns):
                expected_BT[b, t] = math.fsum(gamma**k * x for k, x in enumerate(tokens[i:]))
        torch.testing.assert_close(returns_BT.cpu().double(), expected_BT, atol=1e-5, rtol=1e-5)
        minus_values_BT = expected_BT - inputs[values].cpu().double() * inputs["mask_BT"].cpu()
        torch.testing.assert_close(advantages_BT.cpu().double(), minus_values_BT, atol=1e-5, rtol=1e-5)


@few
@given(spans=rows, seed=seeds, left=st.integers(0, 3), right=st.integers(0, 3), gamma=unit, lam=unit)
def test_padding_changes_nothing(device, spans, seed, left, right, gamma, lam):
    inputs = batch(spans, 8, seed, device, gamma=gamma, lam=lam)

    def padded(x, fill):
        return torch.nn.functional.pad(x, (left, right), value=fill)

    moved = {
        name: padded(x, False if x.dtype == torch.bool else 99.0) if isinstance(x, torch.Tensor) and x.dim() == 2 else x
        for name, x in inputs.items()
    }
    plain, found = shaped_gae(**inputs), shaped_gae(**moved)
    for plain_BT, found_BT in zip(plain[:4], found[:4], strict=True):
        # Not bit for bit: the columns lie elsewhere in the blocks.
        torch.testing.assert_close(padded(plain_BT, 0.0), found_BT, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(plain.sums_6, found.sums_6, atol=1e-4, rtol=1e-5)


def test_advantages_are_constants(device):
    inputs = batch(SPANS, 6, 0, device)
    for name in ("log_probs_BT", "reward_values_BT", "cost_values_BT"):
        inputs[name].requires_grad_()
    assert not any(x.requires_grad for x in shaped_gae(**inputs))


# The mix and its whitening.


@few
@given(reward=st.floats(-100, 100, width=32), cost=st.floats(-100, 100, width=32), lam=st.floats(0, 1e6))
def test_the_mix_lies_between_the_reward_and_minus_the_cost(device, reward, cost, lam):
    reward_N, cost_N = torch.tensor([reward], device=device), torch.tensor([cost], device=device)
    assert mixed(reward_N, cost_N, 0.0).item() == pytest.approx(reward, rel=1e-6, abs=1e-30)
    found, slack = mixed(reward_N, cost_N, lam).item(), 1e-6 * max(abs(reward), abs(cost))
    assert min(reward, -cost) - slack <= found <= max(reward, -cost) + slack


@pytest.mark.parametrize("lam", [0.0, 0.7, 20.0])
def test_sums_of_parts_whiten_the_whole(device, lam):
    """Also where the mean is ten times the standard deviation and their squares nearly cancel."""
    inputs = batch(SPANS, 6, 1, device, gamma=0.0)  # or the offsets would pile up along a row
    inputs["reward_values_BT"] -= 10.0
    inputs["cost_values_BT"] += 10.0
    parts = [
        shaped_gae(**{name: x[part] if isinstance(x, torch.Tensor) else x for name, x in inputs.items()})
        for part in ([0, 1], [2, 3, 4])
    ]
    mean, var = mixed_moments(sum(part.sums_6 for part in parts), torch.tensor(lam, device=device))
    reward_N, cost_N = (
        torch.cat([getattr(part, name) for part in parts]).flatten()
        for name in ("reward_advantages_BT", "cost_advantages_BT")
    )
    whitened_N = mixed(reward_N, cost_N, lam, advantage_mean=mean, advantage_rstd=var.rsqrt())
    inside = whitened_N[inputs["mask_BT"].flatten()]
    assert abs(mean) > 5 * var.sqrt()
    assert inside.mean().item() == pytest.approx(0, abs=1e-4)
    assert inside.std(correction=0).item() == pytest.approx(1, abs=1e-3)


def test_whitening_one_token_gives_about_zero_not_nan(device):
    inputs = batch([(1, 1)], 3, 0, device)
    found = shaped_gae(**inputs)
    mean, var = mixed_moments(found.sums_6, torch.tensor(0.7, device=device))
    reward_N, cost_N = found.reward_advantages_BT[0, 1:2], found.cost_advantages_BT[0, 1:2]
    whitened_N = mixed(reward_N, cost_N, 0.7, advantage_mean=mean, advantage_rstd=torch.rsqrt(var + 1e-8))
    assert abs(mean.item()) > 0.1 and abs(whitened_N.item()) < 1e-2


# The losses.


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
def test_policy_clipping_on_both_sides(device, ratio, advantage, loss, slope):
    one_N = torch.ones(1, device=device)
    found, statistics, slope_N = policy_loss(math.log(ratio) * one_N, advantage * one_N, one_N, one_N, 0.0)
    assert (found.item(), slope_N.item()) == pytest.approx((loss, slope), rel=1e-5)
    assert (statistics["clipped"], statistics["tokens"]) == (abs(ratio - 1) > CLIP, 1)


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
def test_value_clipping_on_both_sides(device, value, target, loss, slope):
    value_BT, old_BT, target_BT, one_BT = (torch.tensor([[x]], device=device) for x in (value, 0.0, target, 1.0))
    found = value_loss(value_BT.requires_grad_(), old_BT, target_BT, one_BT, 0.3)
    found.backward()
    assert (found.item(), value_BT.grad.item()) == pytest.approx((loss, slope), rel=1e-5)


@few
@given(log_ratios=st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=5))
def test_the_kl_estimate_is_never_negative(device, log_ratios):
    log_ratio_N = torch.tensor(log_ratios, device=device)
    one_N = torch.ones_like(log_ratio_N)
    assert policy_loss(log_ratio_N, one_N, one_N, one_N, 0.0)[1]["approximate_kl"] >= 0


def policy_part(x_BT, old_BT, target_BT, mask_BT, weights_BT):
    reward_N, cost_N = target_BT.flatten(), (target_BT + 1).flatten()
    log_ratio_N = (x_BT - old_BT).flatten()
    loss, statistics, slope_N = policy_loss(log_ratio_N, reward_N, cost_N, weights_BT.flatten(), 0.7, mask_BT.flatten())
    return torch.tensor([loss, *statistics.values()]), slope_N.view_as(x_BT)


def value_part(x_BT, old_BT, target_BT, mask_BT, weights_BT):
    leaf_BT = x_BT.clone().requires_grad_()
    loss = value_loss(leaf_BT, old_BT, target_BT, weights_BT, 0.3)
    loss.backward()
    return loss.detach().cpu()[None], leaf_BT.grad


@pytest.mark.parametrize("mode", ["sequence", "token"])
@pytest.mark.parametrize("part", [policy_part, value_part])
def test_micro_batches_add_up_to_the_whole_batch(device, part, mode):
    mask_BT = mask_from(SPANS, 6, device)
    tensors = [normal(len(SPANS), 6, seed=seed, device=device).masked_fill(~mask_BT, math.nan) for seed in range(3)]
    normalizer = {"sequence": len(SPANS), "token": int(mask_BT.sum())}[mode]

    def of(rows):
        inputs = [x[rows] for x in (*tensors, mask_BT)]
        return part(*inputs, token_weights(inputs[-1], mode, normalizer))

    whole, slope_BT = of([0, 1, 2, 3, 4])
    micro_batches = [of(rows) for rows in ([0, 3], [1], [2, 4])]
    torch.testing.assert_close(sum(sums for sums, _ in micro_batches), whole)
    torch.testing.assert_close(torch.cat([slope for _, slope in micro_batches]), slope_BT[[0, 3, 1, 2, 4]])
    assert (slope_BT[~mask_BT] == 0).all() and slope_BT.abs().max() > 0.01


@pytest.mark.parametrize("mode", ["sequence", "token"])
def test_value_losses_are_means_over_sequences_or_tokens(device, mode):
    """The weight of a token: 1 / (its row's tokens x all sequences), or 1 / all tokens."""
    mask_BT = mask_from(SPANS, 6, device)
    values_BT, old_BT, returns_BT = (normal(len(SPANS), 6, seed=seed, device=device) for seed in (5, 6, 7))
    loss_BT = torch.zeros(len(SPANS), 6, dtype=torch.float64)
    for b, (first, number) in enumerate(SPANS):
        for t in range(first, first + number):
            v, old, target = (x[b, t].item() for x in (values_BT, old_BT, returns_BT))
            loss_BT[b, t] = 0.5 * max((v - target) ** 2, (min(max(v, old - 0.3), old + 0.3) - target) ** 2)
    row_means = [loss_BT[b, a : a + n].mean().item() if n else 0.0 for b, (a, n) in enumerate(SPANS)]
    tokens = sum(n for _, n in SPANS)
    expected, normalizer = {
        "sequence": (sum(row_means) / len(SPANS), len(SPANS)), "token": (loss_BT.sum().item() / tokens, tokens)
    }[mode]  # fmt: skip
    found = value_loss(values_BT, old_BT, returns_BT, token_weights(mask_BT, mode, normalizer), 0.3)
    assert found.item() == pytest.approx(expected, rel=1e-5)
