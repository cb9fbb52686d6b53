"""From trajectories to what PPO learns from: scores, values, shaped rewards and costs, advantages.

Legend: B rows on this data-parallel rank, L tokens, T = L - 1 actions (column t predicts token t + 1).
"""

from dataclasses import dataclass

import torch

from megatron_safe.config import PpoTrainingConfig
from megatron_safe.kernels.shaped_gae import ShapedGae, shaped_gae
from megatron_safe.models.heads import last_token_scores, token_log_probs
from megatron_safe.models.pipeline import forward
from megatron_safe.models.roles import Role
from megatron_safe.rollout.generate import Trajectories


@dataclass(frozen=True)
class Experience:
    """A scored rollout batch; [B] or [B, T], fp32, masked outside the answers.

    `rewards_B` and `costs_B` are the episode scores R and C (zeros where a baseline has no cost model); `gae` holds the
    advantages and returns of both.
    """

    trajectories: Trajectories
    ref_log_probs_BT: torch.Tensor
    rewards_B: torch.Tensor
    costs_B: torch.Tensor
    reward_values_BT: torch.Tensor
    cost_values_BT: torch.Tensor
    gae: ShapedGae


def score(
    roles: dict[str, Role], trajectories: Trajectories, config: PpoTrainingConfig, temperature: float
) -> Experience:
    """Reference log-probabilities, episode reward and cost, both critics' values, and what follows from them."""
    batch, mask_BT = trajectories.batch, trajectories.mask_BT
    inputs = {
        "tokens": batch.tokens_BL[:, :-1],
        "targets": batch.tokens_BL[:, 1:],
        "like": batch.tokens_BL[:, 1:],
    }
    whole = {"tokens": batch.tokens_BL, "lengths": batch.lengths_B, "like": batch.lengths_B}
    size = config.score_micro_batch_size

    def episode(name: str) -> torch.Tensor:
        if name not in roles:
            return torch.zeros(len(batch), device=mask_BT.device)
        return forward(roles[name], whole, lambda scores, part: last_token_scores(scores, part["lengths"]), size)

    def values(name: str) -> torch.Tensor:
        if name not in roles:
            return torch.zeros_like(trajectories.log_probs_BT)
        return forward(roles[name], inputs, lambda scores, part: scores.float(), size) * mask_BT

    ref_log_probs_BT = mask_BT * forward(
        roles["reference"],
        inputs,
        lambda hidden, part: token_log_probs(roles["reference"].module, hidden, part["targets"], temperature),
        size,
    )
    rewards_B = episode("reward_model") - config.missing_eos_penalty * ~trajectories.ended_B
    costs_B = episode("cost_model")
    reward_values_BT, cost_values_BT = values("reward_critic"), values("cost_critic")
    gae = shaped_gae(
        trajectories.log_probs_BT, ref_log_probs_BT, rewards_B, costs_B, reward_values_BT, cost_values_BT, mask_BT,
        config.kl_coeff, config.score_clip, config.gamma, config.gae_lambda,
    )  # fmt: skip
    return Experience(
        trajectories, ref_log_probs_BT, rewards_B, costs_B, reward_values_BT, cost_values_BT, gae
    )
