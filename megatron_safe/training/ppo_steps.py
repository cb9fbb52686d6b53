"""One optimizer step of the actor and of the critics on a mini-batch of experience.

Legend: B rows of the mini-batch on this data-parallel rank, T actions, v this rank's vocabulary shard.
"""

import torch

from megatron_safe.algorithms.ppo import clipped_policy_loss_BT, clipped_value_loss_BT, policy_statistics, reduce_loss
from megatron_safe.config import PpoTrainingConfig
from megatron_safe.data.batches import TokenBatch
from megatron_safe.models.heads import token_log_probs
from megatron_safe.models.pipeline import forward_backward
from megatron_safe.models.roles import Role
from megatron_safe.training.experience import Experience
from megatron_safe.training.sft import STATISTICS as PTX_STATISTICS
from megatron_safe.training.sft import demonstration_batch, demonstration_loss

ACTOR_STATISTICS = ("actor_loss", "entropy", "clipped", "approximate_kl", "tokens")


def actor_step(
    actor: Role,
    experience: Experience,
    advantages_BT: torch.Tensor,
    rows: slice,
    config: PpoTrainingConfig,
    temperature: float,
    normalizer: float,
    ptx: TokenBatch | None,
) -> dict[str, float]:
    """The clipped surrogate on `rows`, plus γ_ptx x the SFT loss on `ptx`, in one optimizer step.

    Args:
        normalizer: sequences (or action tokens, as `loss_reduction` says) in the global mini-batch.
    """
    tokens_BL = experience.trajectories.batch.tokens_BL[rows]
    batch = {
        "tokens": tokens_BL[:, :-1],
        "targets": tokens_BL[:, 1:],
        "mask": experience.trajectories.mask_BT[rows],
        "old_log_probs": experience.trajectories.log_probs_BT[rows],
        "advantages": advantages_BT[rows],
    }

    def loss(logits_BTv, part):
        log_probs_BT, entropy_BT = token_log_probs(logits_BTv, part["targets"], temperature)
        mask_BT = part["mask"]
        # Outside the answers the ratio means nothing and could overflow: pin it to 1.
        log_probs_BT = torch.where(mask_BT, log_probs_BT, part["old_log_probs"])
        loss_BT = clipped_policy_loss_BT(log_probs_BT, part["old_log_probs"], part["advantages"], config.clip_ratio)
        total = reduce_loss(loss_BT, mask_BT, config.loss_reduction, normalizer)
        statistics = policy_statistics(log_probs_BT.detach(), part["old_log_probs"], mask_BT, config.clip_ratio)
        return total, {"actor_loss": total, "entropy": (entropy_BT.detach() * mask_BT).sum(), **statistics}

    actor.zero_grad()
    sums = forward_backward(actor, batch, loss, ACTOR_STATISTICS, config.micro_batch_size)
    values = {"actor_loss": sums["actor_loss"]}
    tokens = max(sums["tokens"], 1.0)
    values |= {name: sums[key] / tokens for name, key in (
        ("entropy", "entropy"), ("clip_fraction", "clipped"), ("approximate_kl", "approximate_kl")
    )}  # fmt: skip
    if ptx is not None:
        demonstrations, global_tokens = demonstration_batch(ptx, actor.runtime)
        ptx_loss = demonstration_loss(config.ptx_coeff, global_tokens)
        ptx_sums = forward_backward(actor, demonstrations, ptx_loss, PTX_STATISTICS, config.micro_batch_size)
        values["ptx_loss"] = ptx_sums["loss"]
    step = actor.step()
    return values | {"actor_grad_norm": step["grad_norm"], "actor_lr": step["lr"], "actor_skipped": step["skipped"]}


def critic_step(
    critic: Role,
    experience: Experience,
    old_values_BT: torch.Tensor,
    returns_BT: torch.Tensor,
    rows: slice,
    config: PpoTrainingConfig,
    normalizer: float,
) -> dict[str, float]:
    """The clipped value loss of one critic on `rows`."""
    batch = {
        "tokens": experience.trajectories.batch.tokens_BL[rows, :-1],
        "mask": experience.trajectories.mask_BT[rows],
        "old_values": old_values_BT[rows],
        "returns": returns_BT[rows],
    }

    def loss(values_BT, part):
        loss_BT = clipped_value_loss_BT(values_BT.float(), part["old_values"], part["returns"], config.clip_value)
        total = reduce_loss(loss_BT, part["mask"], config.loss_reduction, normalizer)
        return total, {"value_loss": total}

    critic.zero_grad()
    values = forward_backward(critic, batch, loss, ("value_loss",), config.micro_batch_size)
    step = critic.step()
    return {
        f"{critic.name}_value_loss": values["value_loss"],
        f"{critic.name}_grad_norm": step["grad_norm"],
        f"{critic.name}_skipped": step["skipped"],
    }
