"""What a reader of the paper would write: the plain PyTorch that tools/profile_kernels.py measures `kernels/` against.

Legend: N tokens, v vocabulary, B sequences, T actions, W the window of episode costs; C samples, G key/value heads,
q query heads of each, D head size, K cells of a cache slot.
"""

import math

import torch


def eager_logprob(logits_Nv, targets_N):
    log_p_Nv = logits_Nv.float().log_softmax(dim=-1)
    entropy_N = -(log_p_Nv.exp() * log_p_Nv).sum(dim=-1)
    return log_p_Nv.gather(1, targets_N[:, None])[:, 0], entropy_N


def eager_loss(logits_Nv, targets_N, old_N, reward_N, cost_N, mask_N, weights_N, lam, clip_ratio):
    log_probs_N, entropy_N = eager_logprob(logits_Nv, targets_N)
    advantages_N = (reward_N - lam * cost_N) / (1.0 + lam)
    log_ratio_N = torch.where(mask_N, log_probs_N - old_N, 0.0)
    ratio_N = log_ratio_N.exp()
    clipped_N = ratio_N.clamp(1.0 - clip_ratio, 1.0 + clip_ratio)
    loss_N = -torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N)
    with torch.no_grad():
        clipped = ((ratio_N - 1).abs() > clip_ratio).sum()
        statistics = ((entropy_N * mask_N).sum(), clipped, (ratio_N - 1 - log_ratio_N).sum(), mask_N.sum())
    return (loss_N * weights_N).sum(), torch.stack([x.double() for x in statistics])


def eager_sample(logits_Nv):
    log_p_Nv = logits_Nv.float().log_softmax(dim=-1)
    tokens_N = torch.multinomial(log_p_Nv.exp(), 1)
    return tokens_N[:, 0], log_p_Nv.gather(1, tokens_N)[:, 0]


def eager_decode_attention(query_CGqD, keys_CGKD, values_CGKD, positions_C):
    seen_CK = torch.arange(keys_CGKD.size(2), device=positions_C.device) <= positions_C[:, None]
    context_CH1D = torch.nn.functional.scaled_dot_product_attention(
        query_CGqD.flatten(1, 2)[:, :, None], keys_CGKD, values_CGKD, attn_mask=seen_CK[:, None, None],
        enable_gqa=query_CGqD.size(2) > 1,
    )  # fmt: skip
    return context_CH1D.view_as(query_CGqD)


def shape(log_probs_BT, ref_log_probs_BT, rewards_B, costs_B, mask_BT, kl_coeff, score_clip):
    """Token rewards and token costs."""
    after_BT = torch.nn.functional.pad(mask_BT[:, 1:], (0, 1), value=False)
    last_BT = mask_BT & ~after_BT
    kl_BT = torch.where(mask_BT, log_probs_BT - ref_log_probs_BT, 0.0)
    token_rewards_BT = -kl_coeff * kl_BT + torch.where(last_BT, rewards_B[:, None], 0.0)
    token_costs_BT = kl_coeff * kl_BT + torch.where(last_BT, costs_B[:, None], 0.0)
    return token_rewards_BT.clamp(-score_clip, score_clip), token_costs_BT.clamp(-score_clip, score_clip)


def advantages_and_returns(values_BT, rewards_BT, mask_BT, gamma, lam):
    values_BT = torch.where(mask_BT, values_BT, 0.0)
    rewards_BT = torch.where(mask_BT, rewards_BT, 0.0)
    next_value_B = torch.zeros_like(values_BT[:, 0])
    next_advantage_B = torch.zeros_like(values_BT[:, 0])
    reversed_columns = []
    for t in reversed(range(values_BT.size(1))):
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        # In the column before the first True one, delta holds γ V of the first.
        next_advantage_B = torch.where(mask_BT[:, t], delta_B + gamma * lam * next_advantage_B, 0.0)
        next_value_B = values_BT[:, t]
        reversed_columns.append(next_advantage_B)
    advantages_BT = torch.stack(reversed_columns[::-1], dim=1)
    return advantages_BT, advantages_BT + values_BT


def eager_gae(
    log_probs_BT, ref_log_probs_BT, rewards_B, costs_B, reward_values_BT, cost_values_BT, mask_BT,
    kl_coeff, score_clip, gamma, lam,
):  # fmt: skip
    token_BT = shape(log_probs_BT, ref_log_probs_BT, rewards_B, costs_B, mask_BT, kl_coeff, score_clip)
    reward = advantages_and_returns(reward_values_BT, token_BT[0], mask_BT, gamma, lam)
    cost = advantages_and_returns(cost_values_BT, token_BT[1], mask_BT, gamma, lam)
    return reward[0], cost[0], reward[1], cost[1]


def eager_value_loss(values_BT, old_BT, returns_BT, weights_BT, clip_value):
    clipped_BT = torch.clamp(values_BT, old_BT - clip_value, old_BT + clip_value)
    loss_BT = 0.5 * torch.maximum((values_BT - returns_BT).square(), (clipped_BT - returns_BT).square())
    return (loss_BT * weights_BT).sum()


def eager_lagrange_step(lambda_, costs_W, costs_B, lambda_lr, threshold, lambda_min, lambda_max):
    """The next λ, on the host. costs_W: the window, a deque; it takes in this batch's costs."""
    costs_W.extend(costs_B.tolist())
    mean = sum(costs_W) / len(costs_W)
    return min(max(lambda_ * math.exp(lambda_lr * lambda_ * (mean - threshold)), lambda_min), lambda_max)
