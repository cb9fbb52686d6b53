"""How far the policy that sampled is from the one that learns, and weights that make up for it.

A rollout computes log-probabilities in its own way (a KV cache, other kernels, other orders of sums, in bf16 above
all), so samples come from a policy π_rollout near π_old, the training forward of the same weights. PPO's expectation
over π_old is one over π_rollout with the importance weights π_old / π_rollout; truncated, they cost a little bias and
bound the variance (Ionides, 2008; for this purpose Yao et al., 2025, "Your Efficient RL Framework Secretly Brings You
Off-Policy RL Training"):

    loss = -E_{y ~ π_rollout} [ min(π_old / π_rollout, C) min(ρ Â, clip(ρ, 1 - ε, 1 + ε) Â) ],    ρ = π_θ / π_old,

token by token, the weight a constant. Both sides of ρ are training forwards: π_θ / π_rollout would hold π_old /
π_rollout a second time, and the clip would cut off around a policy at which no update starts. Without a correction
ρ = π_θ / π_rollout does: there the difference is taken for a step of the policy.

The rollout's log-probabilities are those of the whole vocabulary: what top-k or top-p leave out is not corrected for.

Legend: B rows on this data-parallel rank, T columns of actions.
"""

import dataclasses

import torch

from megatron_safe.models.roles import Role
from megatron_safe.rollout.generate import Trajectories
from megatron_safe.training.experience import answer_log_probs


def verify(
    actor: Role, trajectories: Trajectories, max_tokens: int, temperature: float, cap: float | None = None
) -> tuple[Trajectories, dict[str, float]]:
    """Measure the difference by a forward of the actor, before any update; with a cap, correct for it.

    Args:
        max_tokens: of a pack.
        cap: C, at least 1; None only measures.

    Returns:
        The trajectories. With a cap, `log_probs_BT` are the training forward's, for the KL to the reference too, and
        `importance_BT` holds the weights, 1 outside the answers.
        Over all action tokens of the global batch, the same on every rank: `rollout_logprob_difference`, the mean
        of |d|, d = log π_old - log π_rollout; `rollout_logprob_difference_max`; `rollout_kl`, the mean of e^d - 1 - d
        (Schulman's k3 estimate of KL(π_rollout || π_old), in nats per token).
    """
    runtime, mask_BT = actor.runtime, trajectories.mask_BT
    log_probs_BT = answer_log_probs(actor, trajectories, max_tokens, temperature)
    difference_BT = torch.where(mask_BT, log_probs_BT.double() - trajectories.log_probs_BT.double(), 0.0)
    largest_1 = difference_BT.abs().max()[None]
    sums = runtime.sum_over_data_parallel(
        {
            "tokens": float(mask_BT.sum()),
            "difference": float(difference_BT.abs().sum()),
            "kl": float((difference_BT.expm1() - difference_BT).sum()),
        }
    )
    measured = {
        "rollout_logprob_difference": sums["difference"] / sums["tokens"],
        "rollout_logprob_difference_max": float(runtime.gather_over_data_parallel(largest_1).max()),
        "rollout_kl": sums["kl"] / sums["tokens"],
    }
    if cap is not None:
        importance_BT = difference_BT.exp().clamp(max=cap).float()
        trajectories = dataclasses.replace(trajectories, log_probs_BT=log_probs_BT, importance_BT=importance_BT)
    return trajectories, measured
