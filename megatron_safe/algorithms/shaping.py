"""From one reward and one cost per answer to one per token, with the KL penalty in both (Safe RLHF, appendix B).

Shapes: B sequences; T = L - 1 actions. Column t holds what belongs to predicting token t + 1; mask_BT is True where
token t + 1 is a sampled response token, in one contiguous run per row (possibly empty).
"""

import torch


def shape_rewards_and_costs(
    log_probs_BT: torch.Tensor,
    ref_log_probs_BT: torch.Tensor,
    rewards_B: torch.Tensor,
    costs_B: torch.Tensor,
    mask_BT: torch.Tensor,
    kl_coeff: float,
    score_clip: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """r_t = -β k_t, plus R at the last token; c_t = +β k_t, plus C at the last token; k_t = log π_θ - log π_ref.

    Both are clipped to ±score_clip (the sum, as in the authors' code) and are zero outside the mask, whatever the
    inputs hold there, NaN included.

    β is `kl_coeff`. The paper writes β/2 in both. PPO-Lag optimises (r - λ c) / (1 + λ), and with the β used here and
    in the authors' code its KL part is (-β k_t - λ β k_t) / (1 + λ) = -β k_t: exactly β for every λ, so that a moving
    λ never loosens the tie to the reference model. In the paper's notation the same mix carries β/2; to use a β from
    there, halve it. The identity ends where a score is clipped.

    log_probs_BT, ref_log_probs_BT: [B, T] float, of the policy that sampled and of the reference model.
    rewards_B, costs_B: [B] float. mask_BT: [B, T] bool. Returns token rewards and token costs, [B, T] each.
    """
    after_BT = torch.nn.functional.pad(mask_BT[:, 1:], (0, 1), value=False)
    last_BT = mask_BT & ~after_BT
    kl_BT = torch.where(mask_BT, log_probs_BT - ref_log_probs_BT, 0.0)
    token_rewards_BT = -kl_coeff * kl_BT + torch.where(last_BT, rewards_B[:, None], 0.0)
    token_costs_BT = kl_coeff * kl_BT + torch.where(last_BT, costs_B[:, None], 0.0)
    return token_rewards_BT.clamp(-score_clip, score_clip), token_costs_BT.clamp(-score_clip, score_clip)
