"""The Lagrangian PPO loss of the actor, straight from its logits.

With ρ = π_θ(y) / π_old(y), Â = (Â_r - λ Â_c) / (1 + λ) (Safe RLHF, appendix B), optionally whitened, ε the clip ratio
and w a token's weight in the mean (Schulman et al., 2017, eq. 7):
    loss = Σ w l,    l = -min(ρ Â, clip(ρ, 1 - ε, 1 + ε) Â),
    dl / d log π_θ(y) = -ρ Â where ρ Â is the smaller of the two, else 0,
and from there to the logits as in `vocab_parallel_logprob`. λ and the moments are tensors on the device: nothing waits
for the host.

Legend: B sequences, T actions, N tokens, v = V/p this rank's vocabulary shard.
"""

from typing import Literal

import torch
import torch.distributed as dist

from .backend import tl, triton, use_triton
from .vocab_parallel_logprob import (
    TorchLogProb,
    combine_ranks,
    launch_gradient_,
    launch_statistics,
    writable_rows,
)

STATISTICS = ("entropy", "clipped", "approximate_kl", "tokens")

# exp() of more overflows fp32, and an infinite ratio times an advantage of 0 would be NaN.
_MAX_LOG_RATIO = 80.0


def token_weights(
    mask_BT: torch.Tensor, mode: Literal["sequence", "token"], normalizer: float | torch.Tensor
) -> torch.Tensor:
    """Each token's weight in the mean over the GLOBAL batch, [B, T] fp32, 0 outside the mask.

    'sequence': 1 / (tokens of its row x normalizer), normalizer = sequences of the global batch. 'token': 1 /
    normalizer = action tokens of the global batch. A normalizer below 1 counts as 1. Raises ValueError for other modes.
    """
    weights_BT = mask_BT.float() / torch.as_tensor(normalizer, dtype=torch.float32).clamp(min=1)
    if mode == "sequence":
        weights_BT /= mask_BT.sum(dim=1, keepdim=True).clamp(min=1)
    elif mode != "token":
        raise ValueError(f"mode must be 'sequence' or 'token', found {mode!r}")
    return weights_BT


# Triton.


@triton.jit
def _loss_kernel(
    stats_ptr, old_ptr, reward_advantages_ptr, cost_advantages_ptr, mask_ptr, weights_ptr, lam_ptr, mean_ptr, rstd_ptr,
    max_ptr, log_sum_ptr, gradient_ptr, sums_ptr, rows, ranks, clip_ratio,
    WHITEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK tokens: all ranks' statistics -> M, log S, d loss / d log-prob, and five partial sums."""
    block = tl.program_id(0)
    n = block * BLOCK + tl.arange(0, BLOCK)
    inside = n < rows
    log_prob, entropy, largest, log_sum = combine_ranks(stats_ptr, n, inside, rows, ranks, True)
    tl.store(max_ptr + n, largest, mask=inside)
    tl.store(log_sum_ptr + n, log_sum, mask=inside)

    kept = tl.load(mask_ptr + n, mask=inside, other=0) != 0
    lam = tl.load(lam_ptr).to(tl.float32)
    reward_advantage = tl.load(reward_advantages_ptr + n, mask=kept, other=0.0)
    cost_advantage = tl.load(cost_advantages_ptr + n, mask=kept, other=0.0)
    advantage = (reward_advantage - lam * cost_advantage) / (1.0 + lam)
    if WHITEN:
        advantage = (advantage - tl.load(mean_ptr).to(tl.float32)) * tl.load(rstd_ptr).to(tl.float32)
    # Outside the answers the ratio means nothing and could overflow: pin it to 1.
    log_ratio = tl.where(kept, log_prob - tl.load(old_ptr + n, mask=kept, other=0.0), 0.0)
    held = log_ratio > 80.0
    log_ratio = tl.where(held, 80.0, log_ratio)
    ratio = tl.exp(log_ratio)
    surrogate = ratio * advantage
    clipped = tl.where(ratio < 1.0 - clip_ratio, 1.0 - clip_ratio, ratio)
    clipped = tl.where(clipped > 1.0 + clip_ratio, 1.0 + clip_ratio, clipped) * advantage
    weight = tl.load(weights_ptr + n, mask=kept, other=0.0)
    lower = tl.where(surrogate > clipped, clipped, surrogate)  # not tl.minimum, which would hide a NaN
    follows = kept & (surrogate <= clipped) & ~held
    tl.store(gradient_ptr + n, tl.where(follows, -surrogate * weight, 0.0), mask=inside)

    # ρ - 1 - log ρ cancels near 1: there its series.
    x = log_ratio
    series = 1.0 + x / 7.0 * (1.0 + x / 8.0 * (1.0 + x / 9.0))
    series = 1.0 + x / 3.0 * (1.0 + x / 4.0 * (1.0 + x / 5.0 * (1.0 + x / 6.0 * series)))
    kl = tl.where(tl.abs(x) < 0.5, 0.5 * x * x * series, (ratio - 1.0) - x)
    is_clipped = kept & ((ratio - 1.0 > clip_ratio) | (1.0 - ratio > clip_ratio))
    sums_ptr += block * 5
    tl.store(sums_ptr, tl.sum(tl.where(kept, -lower * weight, 0.0), axis=0))
    tl.store(sums_ptr + 1, tl.sum(tl.where(kept, entropy, 0.0), axis=0))
    tl.store(sums_ptr + 2, tl.sum(is_clipped.to(tl.float32), axis=0))
    tl.store(sums_ptr + 3, tl.sum(kl, axis=0))
    tl.store(sums_ptr + 4, tl.sum(kept.to(tl.float32), axis=0))


class _TritonPpoLagLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, logits_Nv, targets_N, old_log_probs_N, reward_advantages_N, cost_advantages_N, mask_N, weights_N, lam,
        clip_ratio, temperature, group, advantage_mean, advantage_rstd,
    ):  # fmt: skip
        rows = logits_Nv.size(0)
        stats_pN4 = launch_statistics(logits_Nv, targets_N, temperature, group, True, mask_N)
        max_N, log_sum_N, gradient_N = logits_Nv.new_empty(3, rows, dtype=torch.float32).unbind(0)
        block = 128
        sums_K5 = logits_Nv.new_empty(triton.cdiv(rows, block), 5, dtype=torch.float32)
        if rows:
            _loss_kernel[(sums_K5.size(0),)](
                stats_pN4, old_log_probs_N, reward_advantages_N, cost_advantages_N, mask_N, weights_N, lam,
                lam if advantage_mean is None else advantage_mean, lam if advantage_rstd is None else advantage_rstd,
                max_N, log_sum_N, gradient_N, sums_K5, rows, stats_pN4.size(0), clip_ratio,
                WHITEN=advantage_mean is not None, BLOCK=block, num_warps=4,
            )  # fmt: skip
        sums_5 = sums_K5.sum(dim=0, dtype=torch.float64)
        statistics_4 = sums_5[1:].clone()
        ctx.save_for_backward(logits_Nv, targets_N, max_N, log_sum_N, gradient_N)
        ctx.temperature, ctx.group = temperature, group
        ctx.mark_non_differentiable(statistics_4)
        return sums_5[0].float(), statistics_4

    @staticmethod
    def backward(ctx, grad_loss, _):
        logits_Nv, targets_N, max_N, log_sum_N, gradient_N = ctx.saved_tensors
        grad_Nv = launch_gradient_(
            logits_Nv, targets_N, max_N, log_sum_N, None, gradient_N * grad_loss, None, ctx.temperature, ctx.group
        )
        return (grad_Nv,) + (None,) * 12


# PyTorch.


def surrogate_loss(
    log_probs_N: torch.Tensor,
    entropy_N: torch.Tensor,
    old_log_probs_N: torch.Tensor,
    reward_advantages_N: torch.Tensor,
    cost_advantages_N: torch.Tensor,
    mask_N: torch.Tensor,
    weights_N: torch.Tensor,
    lam: torch.Tensor,
    clip_ratio: float,
    advantage_mean: torch.Tensor | None = None,
    advantage_rstd: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `ppo_lag_loss` makes of log-probabilities and entropies, [N] fp32; differentiable in the former."""
    advantages_N = (reward_advantages_N - lam * cost_advantages_N) / (1.0 + lam)
    if advantage_mean is not None:
        advantages_N = (advantages_N - advantage_mean) * advantage_rstd
    advantages_N = torch.where(mask_N, advantages_N, 0.0).float()
    # Outside the answers the ratio means nothing and could overflow: pin it to 1.
    log_ratio_N = torch.where(mask_N, log_probs_N - old_log_probs_N, 0.0).clamp(max=_MAX_LOG_RATIO)
    ratio_N = log_ratio_N.exp()
    clipped_N = ratio_N.clamp(1.0 - clip_ratio, 1.0 + clip_ratio)
    loss_N = -torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N)
    loss = torch.where(mask_N, loss_N * weights_N, 0.0).sum(dtype=torch.float64).float()
    with torch.no_grad():
        exact_N = log_ratio_N.double()
        minus_one_N = exact_N.expm1()  # exact near ρ = 1, where ρ - 1 - log ρ would cancel to noise
        statistics_4 = torch.stack([
            torch.where(mask_N, entropy_N, 0.0).sum(dtype=torch.float64),
            (minus_one_N.abs() > clip_ratio).sum().double(),
            (minus_one_N - exact_N).sum(),
            mask_N.sum().double(),
        ])  # fmt: skip
    return loss, statistics_4


def ppo_lag_loss(
    logits_Nv: torch.Tensor,
    targets_N: torch.Tensor,
    old_log_probs_N: torch.Tensor,
    reward_advantages_N: torch.Tensor,
    cost_advantages_N: torch.Tensor,
    mask_N: torch.Tensor,
    weights_N: torch.Tensor,
    lam: torch.Tensor,
    clip_ratio: float,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    advantage_mean: torch.Tensor | None = None,
    advantage_rstd: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The clipped surrogate loss with mixed advantages, and the statistics of its policy.

    The backward pass CONSUMES the logits, as that of `vocab_parallel_logprob` does. The Triton path reads the logits
    once in each direction, and those of tokens outside the mask not at all.

    Args:
        logits_Nv: [N, V/p] fp32, bf16 or fp16; rank r holds columns r V/p to (r + 1) V/p. Only they get a gradient.
        targets_N: [N] int64, global token ids of the sampled tokens.
        old_log_probs_N: [N] fp32, log-probabilities under the policy that sampled.
        reward_advantages_N, cost_advantages_N: [N] fp32, Â_r and Â_c.
        mask_N: [N] bool; what stands outside it does not matter. All False: loss 0, gradient 0.
        weights_N: [N] fp32, from `token_weights`.
        lam: λ >= 0, 0-d, floating, on the logits' device.
        clip_ratio: ε.
        temperature: > 0, that of the rollout.
        group: tensor-parallel group (None: the whole vocabulary is here).
        advantage_mean, advantage_rstd: mean and 1 / standard deviation that whiten Â, 0-d on the device; None: not.

    Returns:
        the loss, 0-d fp32, and the sums over masked tokens that `STATISTICS` names, [4] fp64: entropy in nats, tokens
        whose ratio lies outside 1 ± ε, (ρ - 1) - log ρ (Schulman's k3 estimate of KL(π_old || π_θ)), tokens. The same
        on every rank. Sums over the vocabulary accumulate in fp32; Triton's over tokens in fp32 within blocks of 128
        and in fp64 across them.

    log ρ is held at 80, where exp() is still finite; beyond, its gradient is 0. The paths differ as those of
    `vocab_parallel_logprob` do, and a token within that rounding of the clip bound may be counted differently.
    """
    if (advantage_mean is None) != (advantage_rstd is None):
        raise ValueError("advantage_mean and advantage_rstd go together: give both or neither")
    rest = (old_log_probs_N, reward_advantages_N, cost_advantages_N)
    if use_triton(logits_Nv):
        scalars = (lam, lam if advantage_mean is None else advantage_mean)
        if any(scalar.device != logits_Nv.device for scalar in scalars):
            raise ValueError(f"lam and the moments must be on the logits' device, {logits_Nv.device}")
        return _TritonPpoLagLoss.apply(
            writable_rows(logits_Nv), targets_N.contiguous(), *(x.float().contiguous() for x in rest),
            mask_N.contiguous(), weights_N.contiguous(), lam, clip_ratio, temperature, group, advantage_mean,
            advantage_rstd,
        )  # fmt: skip
    log_probs_N, entropy_N = TorchLogProb.apply(logits_Nv, targets_N, temperature, group, True)
    return surrogate_loss(
        log_probs_N, entropy_N, *rest, mask_N, weights_N, lam, clip_ratio, advantage_mean, advantage_rstd
    )
