"""From trajectories to what PPO learns from: scores, values, shaped rewards and costs, advantages.

Legend: B rows on this data-parallel rank, L tokens, T = L - 1 actions (column t predicts token t + 1), N actions in
all; 2: reward, cost; k outputs of a critic.
"""

from dataclasses import dataclass

import torch

from megatron_safe.config import PpoTrainingConfig
from megatron_safe.kernels.shaped_gae import ShapedGae, shaped_gae
from megatron_safe.models.heads import token_log_probs
from megatron_safe.models.packing import Sequences
from megatron_safe.models.pipeline import forward
from megatron_safe.models.roles import VALUES, Role
from megatron_safe.rollout.generate import Trajectories


@dataclass(frozen=True)
class Scores:
    """A rollout batch and what the models say of it; [B] or [B, T], fp32, zeros outside the answers.

    `rewards_B` and `costs_B` are the episode scores R and C (zeros where a baseline has no cost model). `values_2BT`
    are the critics' values; None where they come from the critics' training forward (`single_update`).
    """

    trajectories: Trajectories
    ref_log_probs_BT: torch.Tensor
    rewards_B: torch.Tensor
    costs_B: torch.Tensor
    values_2BT: torch.Tensor | None


@dataclass(frozen=True)
class Experience:
    """A scored rollout batch; `gae` holds the advantages and returns of reward and cost."""

    trajectories: Trajectories
    ref_log_probs_BT: torch.Tensor
    rewards_B: torch.Tensor
    costs_B: torch.Tensor
    reward_values_BT: torch.Tensor
    cost_values_BT: torch.Tensor
    gae: ShapedGae


def single_update(config: PpoTrainingConfig) -> bool:
    """Whether a rollout batch is one mini-batch, trained on once: then the weights that value it are those that train
    on it, and one forward of a critic does for both."""
    return config.epochs == 1 and config.mini_batch_size == config.rollout_batch_size


def score(roles: dict[str, Role], trajectories: Trajectories, config: PpoTrainingConfig, temperature: float) -> Scores:
    """Reference log-probabilities, episode reward and cost, and the critics' values where they are needed by now."""
    batch, mask_BT = trajectories.batch, trajectories.mask_BT
    episodes = Sequences.to_last(batch.tokens_BL, batch.lengths_B)
    size = config.max_tokens_per_score_micro_batch

    def episode(name: str) -> torch.Tensor:
        if name not in roles:
            return torch.zeros(len(batch), device=mask_BT.device)
        return forward(roles[name], episodes, size, lambda scores_n, _: scores_n)

    ref_log_probs_BT = answer_log_probs(roles["reference"], trajectories, size, temperature)
    rewards_B = episode("reward_model") - config.missing_eos_penalty * ~trajectories.ended_B
    costs_B = episode("cost_model")
    values_2BT = None if single_update(config) else read_values(critics_of(roles), trajectories, size)
    return Scores(trajectories, ref_log_probs_BT, rewards_B, costs_B, values_2BT)


def answer_log_probs(role: Role, trajectories: Trajectories, max_tokens: int, temperature: float) -> torch.Tensor:
    """Log-probabilities of the answers' tokens under a language role, [B, T] fp32, 0 outside the answers."""
    mask_BT = trajectories.mask_BT

    def log_probs(hidden_nh, part):
        return token_log_probs(role.module, hidden_nh, part["targets"], temperature)

    targets = {"targets": trajectories.batch.tokens_BL[:, 1:][mask_BT]}
    return _spread(forward(role, actions(trajectories), max_tokens, log_probs, targets), mask_BT)


def critics_of(roles: dict[str, Role]) -> list[Role]:
    return [roles[name] for name in VALUES if name in roles]


def read_values(critics: list[Role], trajectories: Trajectories, max_tokens: int) -> torch.Tensor:
    """The critics' values of reward and cost, [2, B, T] fp32, zeros where there is no critic."""
    mask_BT = trajectories.mask_BT
    values_2BT = torch.zeros(2, *mask_BT.shape, device=mask_BT.device)
    for critic in critics:
        kinds = VALUES[critic.name]
        shape = () if len(kinds) == 1 else (len(kinds),)
        values_Nk = forward(critic, actions(trajectories), max_tokens, lambda values_n, _: values_n, shape=shape)
        for kind, values_N in zip(kinds, values_Nk.view(-1, len(kinds)).unbind(1), strict=True):
            values_2BT[kind] = _spread(values_N, mask_BT)
    return values_2BT


def estimate(scores: Scores, values_2BT: torch.Tensor, config: PpoTrainingConfig) -> Experience:
    """The experience that follows from scores and values."""
    return Experience(
        scores.trajectories, scores.ref_log_probs_BT, scores.rewards_B, scores.costs_B, *values_2BT.unbind(),
        advantages(scores, values_2BT, config),
    )  # fmt: skip


def advantages(scores: Scores, values_2BT: torch.Tensor, config: PpoTrainingConfig) -> ShapedGae:
    """Of each row by itself: what values a row has changes nothing in another (but the sums)."""
    trajectories = scores.trajectories
    return shaped_gae(
        trajectories.log_probs_BT, scores.ref_log_probs_BT, scores.rewards_B, scores.costs_B, *values_2BT.unbind(),
        trajectories.mask_BT, config.kl_coeff, config.score_clip, config.gamma, config.gae_lambda,
    )  # fmt: skip


def actions(trajectories: Trajectories, rows: slice = slice(None)) -> Sequences:
    """Some of the rows, to be read where they predict what was sampled."""
    batch = trajectories.batch
    return Sequences.to_predict(batch.tokens_BL[rows], batch.lengths_B[rows], trajectories.mask_BT[rows])


def _spread(of_actions_N: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    return torch.zeros(mask_BT.shape, device=mask_BT.device).masked_scatter_(mask_BT, of_actions_N)
