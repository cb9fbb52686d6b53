import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_safe.algorithms.gae import generalized_advantages


def reference(values, rewards, mask, gamma, lam):
    """The definition as a double sum, Â_t = Σ_k (γ λ)^k δ_{t+k}, not the recursion."""
    advantages, returns = [], []
    for b in range(len(mask)):
        columns = [t for t in range(len(mask[b])) if mask[b][t]]
        advantage_row, return_row = [0.0] * len(mask[b]), [0.0] * len(mask[b])
        deltas = []
        for i, t in enumerate(columns):
            next_value = values[b][columns[i + 1]] if i + 1 < len(columns) else 0.0
            deltas.append(rewards[b][t] + gamma * next_value - values[b][t])
        for i, t in enumerate(columns):
            advantage_row[t] = sum((gamma * lam) ** (k - i) * deltas[k] for k in range(i, len(columns)))
            return_row[t] = advantage_row[t] + values[b][t]
        advantages.append(advantage_row)
        returns.append(return_row)
    return advantages, returns


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (1.0, 0.0), (0.5, 1.0)])
@pytest.mark.parametrize("junk", [None, math.nan, math.inf])
def test_equals_the_double_sum(mask_BT, random_BT, gamma, lam, junk):
    values_BT, rewards_BT = random_BT(mask_BT, 1, junk=junk), random_BT(mask_BT, 2, junk=junk)
    found = generalized_advantages(values_BT, rewards_BT, mask_BT, gamma, lam)
    expected = reference(values_BT.tolist(), rewards_BT.tolist(), mask_BT.tolist(), gamma, lam)
    for found_BT, expected_lists in zip(found, expected, strict=True):
        torch.testing.assert_close(found_BT, torch.tensor(expected_lists, dtype=torch.float64))
        assert (found_BT[~mask_BT] == 0).all()


def test_gradient_equals_finite_differences(mask_BT, random_BT, numeric_gradient):
    inputs = torch.stack([random_BT(mask_BT, 1), random_BT(mask_BT, 2)]).requires_grad_()
    weights_BT = random_BT(mask_BT, 3)  # so that no symmetry hides an error

    def weighted(lists) -> float:
        advantages, _ = reference(lists[0], lists[1], mask_BT.tolist(), 0.9, 0.7)
        return (weights_BT * torch.tensor(advantages, dtype=torch.float64)).sum().item()

    advantages_BT, _ = generalized_advantages(inputs[0], inputs[1], mask_BT, 0.9, 0.7)
    (weights_BT * advantages_BT).sum().backward()
    torch.testing.assert_close(inputs.grad, numeric_gradient(weighted, inputs), atol=1e-8, rtol=1e-6)


spans = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=4)


@given(spans, st.integers(0, 10_000))
def test_without_discounts_it_is_reward_to_go_minus_value(mask_from_spans, random_BT, spans, seed):
    mask_BT = mask_from_spans(8, spans)
    values_BT, rewards_BT = random_BT(mask_BT, seed), random_BT(mask_BT, seed + 1)
    advantages_BT, returns_BT = generalized_advantages(values_BT, rewards_BT, mask_BT, 1.0, 1.0)
    to_go_BT = torch.where(mask_BT, rewards_BT, 0.0).flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(returns_BT, torch.where(mask_BT, to_go_BT, 0.0))
    torch.testing.assert_close(advantages_BT, torch.where(mask_BT, to_go_BT - values_BT, 0.0))


@given(spans, st.integers(0, 10_000), st.integers(0, 3), st.integers(0, 3), st.floats(0, 1), st.floats(0, 1))
def test_padding_changes_nothing(mask_from_spans, random_BT, spans, seed, left, right, gamma, lam):
    mask_BT = mask_from_spans(8, spans)
    values_BT, rewards_BT = random_BT(mask_BT, seed), random_BT(mask_BT, seed + 1)

    def padded(x_BT: torch.Tensor, fill: float) -> torch.Tensor:
        return torch.nn.functional.pad(x_BT, (left, right), value=fill)

    plain = generalized_advantages(values_BT, rewards_BT, mask_BT, gamma, lam)
    moved = generalized_advantages(padded(values_BT, 9.0), padded(rewards_BT, 9.0), padded(mask_BT, False), gamma, lam)
    for plain_BT, moved_BT in zip(plain, moved, strict=True):
        torch.testing.assert_close(padded(plain_BT, 0.0), moved_BT, rtol=0, atol=0)
