"""The pieces of the PPO-Lag step: mixed advantages, clipped losses, and sums that add up over micro-batches and ranks.

Shapes: B sequences of a micro-batch; T = L - 1 actions. Column t holds what belongs to predicting token t + 1; mask_BT
is True where token t + 1 is a sampled response token, in one contiguous run per row (possibly empty).

Losses are per token and unmasked; `reduce_loss` masks them. It can only stop a gradient of zero, not 0 · inf, so
inputs outside the mask must be finite with a ratio that does not overflow (rollouts store 0 there).
"""

from typing import Literal

import torch

WHITEN_EPSILON = 1e-8


def mix_advantages(
    adv_reward: torch.Tensor, adv_cost: torch.Tensor, lam: float | torch.Tensor
) -> torch.Tensor:
    """Â = (Â_r - λ Â_c) / (1 + λ) (Safe RLHF, appendix B), elementwise on tensors of one shape.

    lam: the Lagrange multiplier, >= 0, a number or a 0-d tensor. The division keeps the step size independent of λ.
    """
    return (adv_reward - lam * adv_cost) / (1.0 + lam)


def clipped_policy_loss_BT(
    log_probs_BT: torch.Tensor, old_log_probs_BT: torch.Tensor, advantages_BT: torch.Tensor, clip_ratio: float
) -> torch.Tensor:
    """-min(ρ Â, clip(ρ, 1 - ε, 1 + ε) Â) per token, ρ = π_θ / π_old, ε = clip_ratio (Schulman et al., 2017, eq. 7).

    All [B, T] float; old log-probs and advantages are constants, computed without gradient.
    """
    ratio_BT = torch.exp(log_probs_BT - old_log_probs_BT)
    clipped_ratio_BT = ratio_BT.clamp(1.0 - clip_ratio, 1.0 + clip_ratio)
    return -torch.minimum(ratio_BT * advantages_BT, clipped_ratio_BT * advantages_BT)


def clipped_value_loss_BT(
    values_BT: torch.Tensor, old_values_BT: torch.Tensor, returns_BT: torch.Tensor, clip_value: float
) -> torch.Tensor:
    """½ max((V - G)², (clip(V, V_old ± clip_value) - G)²) per token (authors' code), for either critic.

    All [B, T] float; old values and returns G are constants, computed without gradient.
    """
    clipped_values_BT = torch.clamp(values_BT, old_values_BT - clip_value, old_values_BT + clip_value)
    return 0.5 * torch.maximum((values_BT - returns_BT).square(), (clipped_values_BT - returns_BT).square())


def reduce_loss(
    loss_BT: torch.Tensor, mask_BT: torch.Tensor, mode: Literal["sequence", "token"], normalizer: int | float
) -> torch.Tensor:
    """This micro-batch's share of the global mean, 0-d: shares add up over micro-batches and data-parallel ranks.

    'sequence': the mean over each row's action tokens, summed over rows, / normalizer = number of sequences in the
    GLOBAL batch, over all data-parallel ranks (with every sequence weighing the same, as in the authors' code).
    'token': the sum over action tokens / normalizer = number of action tokens in the GLOBAL batch.
    Rows with an empty mask contribute 0. A normalizer of 0 (a batch with no action token at all) gives 0.

    Raises ValueError for another mode.
    """
    row_sum_B = torch.where(mask_BT, loss_BT, 0.0).sum(dim=1)
    if mode == "sequence":
        row_sum_B = row_sum_B / mask_BT.sum(dim=1).clamp(min=1)
    elif mode != "token":
        raise ValueError(f"mode must be 'sequence' or 'token', found {mode!r}")
    return row_sum_B.sum() / max(normalizer, 1)


@torch.no_grad()
def policy_statistics(
    log_probs_BT: torch.Tensor, old_log_probs_BT: torch.Tensor, mask_BT: torch.Tensor, clip_ratio: float
) -> dict[str, torch.Tensor]:
    """Sums over the masked tokens, float64 0-d tensors: add them over micro-batches and ranks, then divide by `tokens`.

    `clipped`: tokens whose ratio ρ = π_θ / π_old lies outside 1 ± clip_ratio. `approximate_kl`: sum of
    (ρ - 1) - log ρ, the non-negative unbiased estimator of KL(π_old || π_θ) (Schulman's k3). `tokens`: their number.
    """
    log_ratio_BT = torch.where(mask_BT, log_probs_BT - old_log_probs_BT, 0.0).double()
    ratio_minus_one_BT = torch.expm1(log_ratio_BT)  # exact near ρ = 1, where ρ - 1 - log ρ would cancel to noise
    return {
        "clipped": (ratio_minus_one_BT.abs() > clip_ratio).sum().double(),
        "approximate_kl": (ratio_minus_one_BT - log_ratio_BT).sum(),
        "tokens": mask_BT.sum().double(),
    }


def masked_moments(x_BT: torch.Tensor, mask_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sum, sum of squares, count) over the masked tokens, float64 0-d tensors, to be added over ranks.

    mean = sum / count and var = sum of squares / count - mean²; float64 because that subtraction cancels.
    """
    x_BT = torch.where(mask_BT, x_BT, 0.0).double()
    return x_BT.sum(), x_BT.square().sum(), mask_BT.sum().double()


def whiten(
    x_BT: torch.Tensor, mask_BT: torch.Tensor, mean: float | torch.Tensor, var: float | torch.Tensor
) -> torch.Tensor:
    """(x - mean) / sqrt(var + 1e-8) where the mask is True, 0 elsewhere; [B, T] in x's dtype.

    mean, var: of the whole global batch, numbers or 0-d tensors, from `masked_moments`. A variance that rounding made
    slightly negative counts as 0.
    """
    mean = torch.as_tensor(mean, dtype=torch.float64, device=x_BT.device)
    var = torch.as_tensor(var, dtype=torch.float64, device=x_BT.device)
    whitened_BT = (x_BT.double() - mean) * torch.rsqrt(var.clamp(min=0.0) + WHITEN_EPSILON)
    return torch.where(mask_BT, whitened_BT, 0.0).to(x_BT.dtype)
