"""PPO-Lag: maximise reward under a limit on cost, with a multiplier that moves by itself (paper, section 3.3).

`run` is the paper's algorithm box. Its baselines are the same loop with the multiplier held still: `ppo` (λ = 0, no
cost critic) and `ppo-reward-shaping` (λ = ν; GAE is linear, so mixing advantages with a fixed ν is the same as
learning from the shaped reward (r - ν c) / (1 + ν)).
"""

from dataclasses import dataclass
from typing import Literal

import torch

from megatron_safe.algorithms.lagrange import LagrangeMultiplier
from megatron_safe.config import LagrangeConfig, PpoConfig, PpoTrainingConfig
from megatron_safe.data.batches import TokenBatch
from megatron_safe.data.datasets import DemonstrationDataset, PromptDataset
from megatron_safe.data.mixture import MixtureStream, read
from megatron_safe.data.sampler import ShuffledStream, shard, shard_by_length
from megatron_safe.data.tokenizer import Tokenizer, load_tokenizer
from megatron_safe.errors import UserError
from megatron_safe.kernels.shaped_gae import mixed_moments
from megatron_safe.models.roles import Role
from megatron_safe.rollout.balance import balance, in_global_order
from megatron_safe.rollout.generate import generate
from megatron_safe.runtime import Runtime
from megatron_safe.training import checkpoint
from megatron_safe.training.experience import Experience, Scores, critics_of, estimate, score
from megatron_safe.training.metrics import PhaseTimer, peak_memory_gib
from megatron_safe.training.off_policy import verify
from megatron_safe.training.ppo_steps import Mix, actor_step, critic_step, critic_step_with_values
from megatron_safe.training.prompts import PromptStream
from megatron_safe.training.run import Run, check_batch
from megatron_safe.training.setup import build_role, ppo_roles, resolve_role

Algorithm = Literal["ppo-lag", "ppo", "ppo-reward-shaping"]
WHITEN_EPSILON = 1e-8  # added to the variance


def run(config: PpoConfig, runtime: Runtime, algorithm: Algorithm) -> None:
    """Train the actor; OUT/checkpoints holds actor, critics, both optimizers' states, λ and its cost window."""
    ppo = config.ppo
    check(config, runtime, algorithm)
    tokenizer = load_tokenizer(config.tokenizer.path, config.tokenizer.template)
    mixture = read("prompts", "data.prompts", config.data.prompts, config.data.on_bad_row, say=runtime.print)
    prompts = PromptDataset(
        mixture.records, tokenizer, config.tokenizer.template, config.rollout.max_prompt_length
    )
    stream = PromptStream(prompts, ppo.rollout_batch_size, ppo.red_team_share, config.run.seed, mixture)
    demonstrations = ptx_demonstrations(config, tokenizer, runtime)
    multiplier = LagrangeMultiplier(**multiplier_settings(config.lagrange), device=runtime.device)

    with Run(config, algorithm, ppo.steps, runtime) as folder:
        roles = make_roles(config, algorithm, tokenizer, runtime, folder)
        learners = [roles["actor"], *critics_of(roles)]
        if folder.resume:
            checkpoint.load_training(learners, folder.resume)
            multiplier.load_state_dict(folder.resume.state["lagrange"])
        runtime.print(prompts.report())
        timer = PhaseTimer()
        for step in range(folder.first_step, ppo.steps):
            indices = shard(stream.indices(step), runtime.dp_rank, runtime.dp_size)
            batch = prompts.batch(indices).to(runtime.device)
            sample_ids = torch.arange(runtime.dp_rank, ppo.rollout_batch_size, runtime.dp_size, device=runtime.device)

            with timer.phase("generate") as phase:
                trajectories = generate(
                    roles["actor"], batch.tokens, step * ppo.rollout_batch_size + sample_ids, config.rollout,
                    config.run.seed, tokenizer.eos_id, tokenizer.pad_id,
                )  # fmt: skip
                phase.tokens = int(trajectories.mask_BT.sum())
            with timer.phase("score") as phase:
                trajectories, red_team_B, rows_N = balance(
                    trajectories, batch.red_team_B, ppo.mini_batch_size, tokenizer.pad_id, runtime
                )
                difference = {}
                if config.rollout.verify_logprobs or ppo.importance_cap is not None:
                    trajectories, difference = verify(
                        roles["actor"], trajectories, ppo.max_tokens_per_score_micro_batch, config.rollout.temperature,
                        ppo.importance_cap,
                    )  # fmt: skip
                scores = score(roles, trajectories, ppo, config.rollout.temperature)
                phase.tokens = int(trajectories.batch.lengths_B.sum())
            with timer.phase("train") as phase:
                costs_N, counted_N = in_global_order(scores.costs_B, rows_N, runtime), None
                if config.lagrange.prompts == "red-team":
                    counted_N = in_global_order(red_team_B, rows_N, runtime)
                multiplier.step(step, costs_N, counted_N, move=algorithm == "ppo-lag")
                lam = multiplier.value
                if algorithm != "ppo-lag":
                    lam = torch.full_like(lam, 0.0 if algorithm == "ppo" else ppo.shaping_coeff)
                experience, values = train(config, roles, scores, lam, demonstrations, step, runtime)
                phase.tokens = ppo.epochs * int(trajectories.batch.lengths_B.sum())

            values |= difference
            values |= rollout_statistics(experience, red_team_B, runtime)
            values |= {"lambda": float(lam), "threshold": config.lagrange.threshold}
            values |= {"j_c": float(multiplier.mean_episode_cost)}
            values |= timer.report() | {"peak_memory_gib": peak_memory_gib()}
            if folder.finish_step(step + 1, values, learners, {"lagrange": multiplier.state_dict()}):
                break


def check(config: PpoConfig, runtime: Runtime, algorithm: Algorithm) -> None:
    """Everything that can be wrong with the settings, before anything is loaded. Raises UserError."""
    ppo = config.ppo
    check_batch(ppo.mini_batch_size, runtime, "ppo.mini_batch_size")
    if ppo.rollout_batch_size <= 0 or ppo.rollout_batch_size % ppo.mini_batch_size:
        raise UserError(
            f"ppo.rollout_batch_size: expected a positive multiple of mini_batch_size {ppo.mini_batch_size}, "
            f"found {ppo.rollout_batch_size}"
        )
    if config.rollout.temperature <= 0:
        raise UserError(f"rollout.temperature: PPO needs a temperature > 0, found {config.rollout.temperature}")
    if ppo.ptx_coeff > 0 and not config.data.ptx:
        raise UserError("data.ptx: expected demonstrations, because ppo.ptx_coeff > 0; found none")
    if config.critics == "shared" and algorithm == "ppo":
        raise UserError("critics: expected separate, because ppo has no critic of the cost; found shared")
    for name in ("reward_critic", "cost_critic") if config.critics == "shared" else ("critic",):
        if getattr(config, name) is not None:
            raise UserError(f"{name}: expected none, because critics is {config.critics}; found one")
    needed = ["actor", "reward_model"] + ([] if algorithm == "ppo" else ["cost_model"])
    for name in needed:
        if getattr(config, name).checkpoint is None:
            raise UserError(f"{name}.checkpoint: expected the run folder of its training, found none")
    try:
        LagrangeMultiplier(**multiplier_settings(config.lagrange))
    except ValueError as error:
        raise UserError(f"lagrange.{error}") from error


def multiplier_settings(lagrange: LagrangeConfig) -> dict:
    return dict(
        lambda_init=lagrange.lambda_init,
        lambda_max=lagrange.lambda_max,
        lambda_min=lagrange.lambda_min,
        lambda_lr=lagrange.lambda_lr,
        threshold=lagrange.threshold,
        update_delay_steps=lagrange.update_delay_steps,
        window=lagrange.episode_cost_window,
    )


@dataclass(frozen=True, slots=True, eq=False)
class PtxDemonstrations:
    """What the PTX term learns from: its rows, and those of each global batch."""

    data: DemonstrationDataset
    stream: ShuffledStream | MixtureStream

    def batch(self, update: int, runtime: Runtime) -> TokenBatch:
        """This data-parallel rank's rows of the batch of an update (from 0)."""
        indices = self.stream.indices(update)
        lengths = self.data.lengths(indices)
        return self.data.batch(shard_by_length(indices, lengths, runtime.dp_rank, runtime.dp_size))


def ptx_demonstrations(config: PpoConfig, tokenizer: Tokenizer, runtime: Runtime) -> PtxDemonstrations | None:
    if config.ppo.ptx_coeff <= 0:
        return None
    mixture = read("demonstrations", "data.ptx", config.data.ptx, config.data.on_bad_row, say=runtime.print)
    longest = config.rollout.max_prompt_length + config.rollout.max_new_tokens
    data = DemonstrationDataset(mixture.records, tokenizer, config.tokenizer.template, longest)
    return PtxDemonstrations(data, mixture.stream(data.records, config.ppo.mini_batch_size, config.run.seed))


def make_roles(
    config: PpoConfig, algorithm: Algorithm, tokenizer: Tokenizer, runtime: Runtime, folder: Run
) -> dict[str, Role]:
    """The roles of the stage, filled."""
    ppo = config.ppo
    updates = ppo.steps * ppo.epochs * (ppo.rollout_batch_size // ppo.mini_batch_size)
    longest = config.rollout.max_prompt_length + config.rollout.max_new_tokens
    wanted = ppo_roles(config, algorithm)
    learners = [name for name, (_, optimizer) in wanted.items() if optimizer is not None]
    if folder.resume is not None and set(learners) - folder.resume.roles.keys():
        raise UserError(
            f"critics: expected those of the run in {folder.folder}, which trains {', '.join(folder.resume.roles)}; "
            f"found {config.critics}"
        )
    # All are looked at before the first is built: a wrong path in the last must not cost minutes.
    plans = {}
    for name, (model, _) in wanted.items():
        plans[name] = plan = resolve_role(name, model, tokenizer, runtime, folder.resume, longest)
        if name in ("reward_model", "cost_model") and not plan.trained:  # its head would score at random
            source = plan.source
            raise UserError(f"{name} {source.path}: expected a trained {name}, found {', '.join(source.roles)}")
    return {
        name: build_role(plans[name], config.precision, config.run.seed, tokenizer, runtime, optimizer, updates)
        for name, (_, optimizer) in wanted.items()
    }


def train(
    config: PpoConfig,
    roles: dict[str, Role],
    scores: Scores,
    lam: torch.Tensor,
    demonstrations: PtxDemonstrations | None,
    step: int,
    runtime: Runtime,
) -> tuple[Experience, dict[str, float]]:
    """All optimizer steps on one rollout batch: what was learnt from, and the means of what was measured."""
    ppo, critics = config.ppo, critics_of(roles)
    values_2BT, measured = scores.values_2BT, {}
    if values_2BT is None:
        values_2BT, measured = train_critics(critics, scores, ppo, runtime)
        critics = []  # that was all
    experience = estimate(scores, values_2BT, ppo)
    mix = make_mix(experience, lam, ppo.whiten_advantages, runtime)
    return experience, measured | learn(
        config, roles["actor"], critics, experience, mix, demonstrations, step, runtime
    )


def make_mix(experience: Experience, lam: torch.Tensor, whitened: bool, runtime: Runtime) -> Mix:
    """The mix at λ = lam, whitened over the global rollout batch if asked."""
    if not whitened:
        return Mix(lam)
    sums_6 = runtime.gather_over_data_parallel(experience.gae.sums_6[None]).sum(dim=0)
    mean, variance = mixed_moments(sums_6, lam)
    return Mix(lam, mean, torch.rsqrt(variance + WHITEN_EPSILON))


def loss_normalizer(mask_BT: torch.Tensor, ppo: PpoTrainingConfig, runtime: Runtime) -> float:
    """What the losses on a mini-batch divide by: its sequences or its action tokens, over all data-parallel ranks."""
    if ppo.loss_reduction == "sequence":
        return float(ppo.mini_batch_size)
    return runtime.sum_over_data_parallel({"tokens": float(mask_BT.sum())})["tokens"]


def train_critics(
    critics: list[Role], scores: Scores, ppo: PpoTrainingConfig, runtime: Runtime
) -> tuple[torch.Tensor, dict[str, float]]:
    """The critics' single update on a rollout batch: their values before it, [2, B, T], and what it measured."""
    normalizer = loss_normalizer(scores.trajectories.mask_BT, ppo, runtime)
    values_2BT, measured = torch.zeros(()), {}
    for critic in critics:
        of_critic_2BT, of_critic = critic_step_with_values(critic, scores, ppo, normalizer)
        values_2BT, measured = values_2BT + of_critic_2BT, measured | of_critic
    return values_2BT, measured


def learn(
    config: PpoConfig,
    actor: Role,
    critics: list[Role],
    experience: Experience,
    mix: Mix,
    demonstrations: PtxDemonstrations | None,
    step: int,
    runtime: Runtime,
) -> dict[str, float]:
    """All optimizer steps of these roles on one rollout batch; the means of what they measured.

    `rollout_kl` is the actor's approximate_kl in the first of them, on a mini-batch whose sampling weights are still
    the actor's own: it shows how far the rollout's log-probabilities are from a training forward's.
    """
    ppo = config.ppo
    batches = ppo.rollout_batch_size // ppo.mini_batch_size
    rows_per_batch = ppo.mini_batch_size // runtime.dp_size
    measured: dict[str, list[float]] = {}
    for update in range(ppo.epochs * batches):
        start = (update % batches) * rows_per_batch
        rows = slice(start, start + rows_per_batch)
        normalizer = loss_normalizer(experience.trajectories.mask_BT[rows], ppo, runtime)
        values = {}
        if step >= ppo.critic_warmup_steps:
            ptx = None
            if demonstrations is not None:
                ptx = demonstrations.batch(step * ppo.epochs * batches + update, runtime)
            values |= actor_step(actor, experience, mix, rows, ppo, config.rollout.temperature, normalizer, ptx)
        for critic in critics:
            values |= critic_step(critic, experience, rows, ppo, normalizer)
        for name, value in values.items():
            measured.setdefault(name, []).append(value)
    means = {name: sum(found) / len(found) for name, found in measured.items()}
    if "approximate_kl" in measured:
        means["rollout_kl"] = measured["approximate_kl"][0]
    return means


def rollout_statistics(experience: Experience, red_team_B: torch.Tensor, runtime: Runtime) -> dict[str, float]:
    """Means over the global rollout batch: reward, cost (all and red-team prompts), KL to the reference, lengths."""
    trajectories, mask_BT = experience.trajectories, experience.trajectories.mask_BT
    rows, red_rows = float(len(red_team_B)), float(red_team_B.sum())
    log_ratio_BT = (trajectories.log_probs_BT - experience.ref_log_probs_BT) * mask_BT
    total = runtime.sum_over_data_parallel(
        {
            "rows": rows,
            "red_rows": red_rows,
            "reward": float(experience.rewards_B.sum()),
            "cost": float(experience.costs_B.sum()),
            "red_cost": float((experience.costs_B * red_team_B).sum()),
            "kl": float(log_ratio_BT.sum()),
            "length": float(mask_BT.sum()),
            "ended": float(trajectories.ended_B.sum()),
        }
    )
    means = {name: total[name] / total["rows"] for name in ("reward", "cost", "kl", "length", "ended")}
    if total["red_rows"]:
        means["red_team_cost"] = total["red_cost"] / total["red_rows"]
    return means
