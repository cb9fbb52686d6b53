"""Generalised advantage estimation (Schulman et al., 2016), used once for the reward and once for the cost.

Shapes: B sequences; T = L - 1 actions. Column t holds what belongs to predicting token t + 1; mask_BT is True where
token t + 1 is a sampled response token, in one contiguous run per row (possibly empty).
"""

import torch


def generalized_advantages(
    values_BT: torch.Tensor, rewards_BT: torch.Tensor, mask_BT: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """δ_t = r_t + γ V(s_{t+1}) - V(s_t); Â_t = δ_t + γ λ_GAE Â_{t+1}; the critic's target is Â_t + V(s_t).

    The state after the last True column is terminal: its value is 0 whatever values_BT holds there, also for an answer
    that was cut at the maximum length (as in the authors' code).

    values_BT, rewards_BT: [B, T] float (pass token costs and the cost critic's values for the cost advantages).
    mask_BT: [B, T] bool. lam: λ_GAE, unrelated to the Lagrange multiplier. Returns advantages and returns, [B, T] each,
    zero outside the mask even where the inputs are NaN.
    """
    values_BT = torch.where(mask_BT, values_BT, 0.0)
    rewards_BT = torch.where(mask_BT, rewards_BT, 0.0)
    # Both are zero at a masked column t + 1, which is what makes the last True column's successor terminal.
    next_value_B = torch.zeros_like(values_BT[:, 0])
    next_advantage_B = torch.zeros_like(values_BT[:, 0])
    reversed_columns = []
    for t in reversed(range(values_BT.size(1))):
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        # Masked again: in the column before the first True one, delta holds γ V of the first.
        next_advantage_B = torch.where(mask_BT[:, t], delta_B + gamma * lam * next_advantage_B, 0.0)
        next_value_B = values_BT[:, t]
        reversed_columns.append(next_advantage_B)
    advantages_BT = torch.stack(reversed_columns[::-1], dim=1)
    return advantages_BT, advantages_BT + values_BT
