"""One optimizer step of the actor and of the critics on a mini-batch of experience.

Legend: B rows of the mini-batch on this data-parallel rank, T actions, h hidden size.
"""

from typing import NamedTuple

import torch

from megatron_safe.config import PpoTrainingConfig
from megatron_safe.data.batches import TokenBatch
from megatron_safe.kernels.linear_ppo_lag_loss import linear_ppo_lag_loss
from megatron_safe.kernels.ppo_lag_loss import STATISTICS, token_weights
from megatron_safe.kernels.value_loss import value_loss
from megatron_safe.models.heads import head_inputs, head_options, sequence_first
from megatron_safe.models.pipeline import forward_backward
from megatron_safe.models.roles import Role
from megatron_safe.training.experience import Experience
from megatron_safe.training.sft import STATISTICS as PTX_STATISTICS
from megatron_safe.training.sft import demonstration_batch, demonstration_loss


class Mix(NamedTuple):
    """Â = (Â_r - λ Â_c) / (1 + λ), whitened with mean and 1 / standard deviation if they are given; 0-d tensors."""

    lam: torch.Tensor
    mean: torch.Tensor | None = None
    rstd: torch.Tensor | None = None


def actor_step(
    actor: Role,
    experience: Experience,
    mix: Mix,
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
    tokens_BL, mask_BT = experience.trajectories.batch.tokens_BL[rows], experience.trajectories.mask_BT[rows]
    per_token = {
        "targets": tokens_BL[:, 1:],
        "old_log_probs": experience.trajectories.log_probs_BT[rows],
        "reward_advantages": experience.gae.reward_advantages_BT[rows],
        "cost_advantages": experience.gae.cost_advantages_BT[rows],
        "mask": mask_BT,
        "weights": token_weights(mask_BT, config.loss_reduction, normalizer),
    }

    def loss(hidden_TBh, part):
        total, statistics_4 = linear_ppo_lag_loss(
            *head_inputs(actor.module, hidden_TBh), *(sequence_first(part[name]) for name in per_token),
            mix.lam, config.clip_ratio, temperature,
            advantage_mean=mix.mean, advantage_rstd=mix.rstd, **head_options(actor.module),
        )  # fmt: skip
        return total, {"actor_loss": total, **dict(zip(STATISTICS, statistics_4.unbind(), strict=True))}

    actor.zero_grad()
    batch = {"tokens": tokens_BL[:, :-1], **per_token}
    sums = forward_backward(actor, batch, loss, ("actor_loss", *STATISTICS), config.micro_batch_size)
    values = {"actor_loss": sums["actor_loss"]}
    tokens = max(sums["tokens"], 1.0)
    values |= {name: sums[key] / tokens for name, key in (
        ("entropy", "entropy"), ("clip_fraction", "clipped"), ("approximate_kl", "approximate_kl")
    )}  # fmt: skip
    if ptx is not None:
        demonstrations, global_tokens = demonstration_batch(ptx, actor.runtime)
        ptx_loss = demonstration_loss(actor, config.ptx_coeff, global_tokens)
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
        "old_values": old_values_BT[rows],
        "returns": returns_BT[rows],
        "weights": token_weights(experience.trajectories.mask_BT[rows], config.loss_reduction, normalizer),
    }

    def loss(values_BT, part):
        total = value_loss(values_BT, part["old_values"], part["returns"], part["weights"], config.clip_value)
        return total, {"value_loss": total}

    critic.zero_grad()
    values = forward_backward(critic, batch, loss, ("value_loss",), config.micro_batch_size)
    step = critic.step()
    return {
        f"{critic.name}_value_loss": values["value_loss"],
        f"{critic.name}_grad_norm": step["grad_norm"],
        f"{critic.name}_skipped": step["skipped"],
    }
