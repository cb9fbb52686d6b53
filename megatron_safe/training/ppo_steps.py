"""One optimizer step of the actor and of the critics on a mini-batch of experience.

Legend: B rows of the mini-batch on this data-parallel rank, T columns of actions, N actions in all, n of them in a
pack, h hidden size; 2: reward, cost; k outputs of a critic.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from megatron_safe.config import PpoTrainingConfig
from megatron_safe.data.batches import TokenBatch
from megatron_safe.kernels.linear_ppo_lag_loss import linear_ppo_lag_loss
from megatron_safe.kernels.ppo_lag_loss import STATISTICS, token_weights
from megatron_safe.kernels.value_loss import value_loss
from megatron_safe.models.heads import head_options
from megatron_safe.models.pipeline import Inputs, forward_backward
from megatron_safe.models.roles import VALUES, Role
from megatron_safe.rollout.generate import Trajectories
from megatron_safe.training.experience import Experience, Scores, actions, advantages
from megatron_safe.training.sft import demonstration_gradient


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
    trajectories, gae = experience.trajectories, experience.gae
    tokens_BL, mask_BT = trajectories.batch.tokens_BL[rows], trajectories.mask_BT[rows]
    per_action = {
        "targets": tokens_BL[:, 1:],
        "old_log_probs": trajectories.log_probs_BT[rows],
        "reward_advantages": gae.reward_advantages_BT[rows],
        "cost_advantages": gae.cost_advantages_BT[rows],
        "mask": mask_BT,
        "weights": token_weights(mask_BT, config.loss_reduction, normalizer),
    }
    if trajectories.importance_BT is not None:
        per_action["weights"] *= trajectories.importance_BT[rows]

    def loss(hidden_nh, part):
        total, statistics_4 = linear_ppo_lag_loss(
            hidden_nh, actor.module.output_weight(), *(part[name] for name in per_action),
            mix.lam, config.clip_ratio, temperature,
            advantage_mean=mix.mean, advantage_rstd=mix.rstd, **head_options(actor.module),
        )  # fmt: skip
        return total, {"actor_loss": total, **dict(zip(STATISTICS, statistics_4.unbind(), strict=True))}

    actor.zero_grad()
    inputs = {name: of_BT[mask_BT] for name, of_BT in per_action.items()}
    size = config.max_tokens_per_micro_batch
    sums = forward_backward(
        actor, actions(trajectories, rows), size, loss, ("actor_loss", *STATISTICS), inputs,
        more_follow=ptx is not None,
    )  # fmt: skip
    values = {"actor_loss": sums["actor_loss"]}
    tokens = max(sums["tokens"], 1.0)
    values |= {name: sums[key] / tokens for name, key in (
        ("entropy", "entropy"), ("clip_fraction", "clipped"), ("approximate_kl", "approximate_kl")
    )}  # fmt: skip
    if ptx is not None:
        values["ptx_loss"] = demonstration_gradient(actor, ptx, size, config.ptx_coeff)["loss"]
    step = actor.step()
    return values | {"actor_grad_norm": step["grad_norm"], "actor_lr": step["lr"], "actor_skipped": step["skipped"]}


def critic_step(
    critic: Role, experience: Experience, rows: slice, config: PpoTrainingConfig, normalizer: float
) -> dict[str, float]:
    """The clipped value loss on `rows`, summed over what the critic values (`VALUES`), in one optimizer step."""
    kinds, mask_BT = VALUES[critic.name], experience.trajectories.mask_BT[rows]
    old_values_2 = experience.reward_values_BT, experience.cost_values_BT
    returns_2 = experience.gae.reward_returns_BT, experience.gae.cost_returns_BT
    inputs = {
        "old_values": torch.stack([old_values_2[kind][rows][mask_BT] for kind in kinds], 1),
        "returns": torch.stack([returns_2[kind][rows][mask_BT] for kind in kinds], 1),
    }

    def targets(_, part):
        return part["old_values"], part["returns"]

    return _critic_step(critic, experience.trajectories, rows, config, normalizer, targets, inputs)


def critic_step_with_values(
    critic: Role, scores: Scores, config: PpoTrainingConfig, normalizer: float
) -> tuple[torch.Tensor, dict[str, float]]:
    """`critic_step` on the whole rollout batch, with the values that its own forward reads: one forward less.

    For a critic's first step on a rollout batch only, when the weights that train are those that value. Packs hold
    whole rows and GAE is a matter of one row, so that the values of a pack are enough for the returns of its actions.

    Returns:
        The values by kind, [2, B, T] fp32, zeros where the critic has none; and what `critic_step` returns.
    """
    kinds, mask_BT = VALUES[critic.name], scores.trajectories.mask_BT
    values_2BT = torch.zeros(2, *mask_BT.shape, device=mask_BT.device)  # filled pack by pack, on the last stage

    def targets(values_nk, part):
        for kind, values_n in zip(kinds, values_nk.unbind(1), strict=True):
            values_2BT[kind].view(-1)[part["at"]] = values_n
        known_2BT = critic.runtime.sum_over_context_parallel(values_2BT)  # whose ranks share the pack's rows
        gae = advantages(scores, known_2BT, config)  # of rows to come it is nonsense, which nobody reads
        returns_2 = gae.reward_returns_BT, gae.cost_returns_BT
        return values_nk, torch.stack([returns_2[kind].view(-1)[part["at"]] for kind in kinds], 1)

    inputs = {"at": mask_BT.view(-1).nonzero()[:, 0]}
    measured = _critic_step(critic, scores.trajectories, slice(None), config, normalizer, targets, inputs)
    runtime = critic.runtime
    return runtime.broadcast_from_last_stage(runtime.sum_over_context_parallel(values_2BT)), measured


def _critic_step(
    critic: Role,
    trajectories: Trajectories,
    rows: slice,
    config: PpoTrainingConfig,
    normalizer: float,
    targets: Callable[[torch.Tensor, Inputs], tuple[torch.Tensor, torch.Tensor]],
    inputs: Inputs,
) -> dict[str, float]:
    """targets: (values [n, k] fp32, inputs of these places) -> old values and returns, both [n, k]."""
    mask_BT = trajectories.mask_BT[rows]
    inputs = inputs | {"weights": token_weights(mask_BT, config.loss_reduction, normalizer)[mask_BT]}
    names = [f"{('reward', 'cost')[kind]}_critic_value_loss" for kind in VALUES[critic.name]]

    def loss(output, part):
        values_nk = output.view(len(output), len(names))
        columns = values_nk, *targets(values_nk.detach().float(), part)
        losses = [
            value_loss(*each, part["weights"], config.clip_value)
            for each in zip(*(column.unbind(1) for column in columns), strict=True)
        ]
        return sum(losses), dict(zip(names, losses, strict=True))

    critic.zero_grad()
    size = config.max_tokens_per_micro_batch
    measured = forward_backward(critic, actions(trajectories, rows), size, loss, tuple(names), inputs)
    step = critic.step()
    return measured | {f"{critic.name}_grad_norm": step["grad_norm"], f"{critic.name}_skipped": step["skipped"]}
