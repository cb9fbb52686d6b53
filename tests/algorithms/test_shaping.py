import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_safe.algorithms.ppo import mix_advantages
from megatron_safe.algorithms.shaping import shape_rewards_and_costs


def reference(log_probs, ref_log_probs, rewards, costs, mask, kl_coeff, score_clip):
    token_rewards, token_costs = [], []
    for b in range(len(mask)):
        columns = [t for t in range(len(mask[b])) if mask[b][t]]
        row_rewards, row_costs = [0.0] * len(mask[b]), [0.0] * len(mask[b])
        for t in columns:
            penalty = kl_coeff * (log_probs[b][t] - ref_log_probs[b][t])
            reward, cost = -penalty, penalty
            if t == columns[-1]:
                reward, cost = reward + rewards[b], cost + costs[b]
            row_rewards[t] = min(max(reward, -score_clip), score_clip)
            row_costs[t] = min(max(cost, -score_clip), score_clip)
        token_rewards.append(row_rewards)
        token_costs.append(row_costs)
    return token_rewards, token_costs


def scores_B(size: int, seed: int) -> torch.Tensor:
    return 3 * torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# 0.25 clips KL and scores on both sides, 50 clips nothing.
@pytest.mark.parametrize("score_clip", [0.25, 2.0, 50.0])
@pytest.mark.parametrize("junk", [None, math.nan, -math.inf])
def test_equals_the_loop(mask_BT, random_BT, score_clip, junk):
    log_probs_BT, ref_log_probs_BT = random_BT(mask_BT, 1, junk=junk), random_BT(mask_BT, 2, junk=junk)
    rewards_B, costs_B = scores_B(len(mask_BT), 3), scores_B(len(mask_BT), 4)
    found = shape_rewards_and_costs(log_probs_BT, ref_log_probs_BT, rewards_B, costs_B, mask_BT, 0.4, score_clip)
    lists = (x.tolist() for x in (log_probs_BT, ref_log_probs_BT, rewards_B, costs_B, mask_BT))
    for found_BT, expected in zip(found, reference(*lists, 0.4, score_clip), strict=True):
        torch.testing.assert_close(found_BT, torch.tensor(expected, dtype=torch.float64))
        assert (found_BT[~mask_BT] == 0).all()


def test_clips_both_scores_on_both_sides():
    mask_BT = torch.tensor([[False, True, True], [False, True, True]])
    log_probs_BT = torch.tensor([[0.0, 9.0, 0.0], [0.0, -9.0, 0.0]])
    rewards_B, costs_B = torch.tensor([7.0, -7.0]), torch.tensor([-8.0, 8.0])
    rewards_BT, costs_BT = shape_rewards_and_costs(
        log_probs_BT, torch.zeros(2, 3), rewards_B, costs_B, mask_BT, kl_coeff=1.0, score_clip=5.0
    )
    assert rewards_BT.tolist() == [[0, -5, 5], [0, 5, -5]]
    assert costs_BT.tolist() == [[0, 5, -5], [0, -5, 5]]


def test_the_score_of_a_row_without_response_goes_nowhere():
    mask_BT = torch.zeros(1, 3, dtype=torch.bool)
    score_B = torch.tensor([math.nan])
    for shaped_BT in shape_rewards_and_costs(torch.ones(1, 3), torch.zeros(1, 3), score_B, score_B, mask_BT, 0.1, 5.0):
        assert shaped_BT.tolist() == [[0, 0, 0]]


spans = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=4)


@given(spans, st.integers(0, 10_000), st.floats(0, 100), st.floats(0.001, 1))
def test_the_mix_carries_exactly_beta_for_every_lambda(mask_from_spans, random_BT, spans, seed, lam, beta):
    mask_BT = mask_from_spans(7, spans)
    log_probs_BT, ref_log_probs_BT = random_BT(mask_BT, seed), random_BT(mask_BT, seed + 1)
    zero_B = torch.zeros(len(spans), dtype=torch.float64)
    rewards_BT, costs_BT = shape_rewards_and_costs(log_probs_BT, ref_log_probs_BT, zero_B, zero_B, mask_BT, beta, 1e9)
    expected_BT = torch.where(mask_BT, -beta * (log_probs_BT - ref_log_probs_BT), 0.0)
    torch.testing.assert_close(mix_advantages(rewards_BT, costs_BT, lam), expected_BT)


@given(spans, st.integers(0, 10_000), st.integers(0, 3), st.integers(0, 3))
def test_padding_changes_nothing(mask_from_spans, random_BT, spans, seed, left, right):
    mask_BT = mask_from_spans(7, spans)
    log_probs_BT, ref_log_probs_BT = random_BT(mask_BT, seed), random_BT(mask_BT, seed + 1)
    rewards_B, costs_B = scores_B(len(spans), seed), scores_B(len(spans), seed + 1)

    def padded(x_BT: torch.Tensor, fill: float) -> torch.Tensor:
        return torch.nn.functional.pad(x_BT, (left, right), value=fill)

    plain = shape_rewards_and_costs(log_probs_BT, ref_log_probs_BT, rewards_B, costs_B, mask_BT, 0.1, 5.0)
    moved_log_probs_BT, moved_ref_BT = padded(log_probs_BT, 99.0), padded(ref_log_probs_BT, -99.0)
    moved_mask_BT = padded(mask_BT, False)
    moved = shape_rewards_and_costs(moved_log_probs_BT, moved_ref_BT, rewards_B, costs_B, moved_mask_BT, 0.1, 5.0)
    for plain_BT, moved_BT in zip(plain, moved, strict=True):
        torch.testing.assert_close(padded(plain_BT, 0.0), moved_BT, rtol=0, atol=0)
