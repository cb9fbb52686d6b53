"""The settings of the whole loop: those of its stages, and what changes from round to round."""

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_safe.config.sections import JudgeConfig, ProgramConfig, RunConfig
from megatron_safe.config.stages import StageConfig


@dataclass
class AnnotatorConfig:
    """Who labels the pairs of answers that the reward and the cost model learn from."""

    kind: Literal["people", "program", "judge"] = "people"
    """`people`: the job stops and waits for Label Studio's export; `program`: yours; `judge`: labels by a judge."""
    least_labelled: float = 0.95
    """People: the share of the pairs that must have labels before the job goes on."""
    program: ProgramConfig = field(default_factory=ProgramConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)


@dataclass
class RoundConfig:
    """One round. The mappings hold settings of the stages of that name, over those that all rounds share."""

    prompts: list[Any] = field(default_factory=list)
    """What to sample pairs of answers for, as data.prompts of the stage `generate`."""
    pairs: int = 0
    """How many pairs, drawn from the prompts by seed (0: one for each prompt, in their order)."""
    red_team: dict[str, Any] | None = None
    """Attack the current policy first, with the cost model of the round before; what works joins this round's prompts
    and those of all later ones (not in the first round, unless `cost_model` names one)."""
    reward: dict[str, Any] = field(default_factory=dict)
    """Settings of this round's reward model alone."""
    cost: dict[str, Any] = field(default_factory=dict)
    """Settings of this round's cost model alone."""
    ppo: dict[str, Any] = field(default_factory=dict)
    """Settings of this round's PPO-Lag alone."""


@dataclass
class RoundsConfig(StageConfig):
    """The whole loop as one resumable job: SFT, rounds of red-teaming, labelling, reward and cost model and PPO-Lag,
    and a report on all policies. Exit code 3 while it waits for people.

    Each mapping holds settings of the stage of that name (and `config`, a YAML file with more of them); paths between
    the stages, and what `run`, `parallel`, `kernels` and `tokenizer` say here, are filled in.
    """

    run: RunConfig = field(default_factory=lambda: RunConfig(out="runs/rounds", resume="auto"))
    start: str | None = None
    """Policy to start from: run folder, checkpoint or Hugging Face folder (default: what `sft` makes)."""
    reward_model: str | None = None
    """Reward model that the first round's starts from (default: the policy's trunk)."""
    cost_model: str | None = None
    """Cost model that the first round's starts from (default: the policy's trunk)."""
    sft: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name -> settings of a stage `sft`, in their order, each starting from the one before."""
    generate: dict[str, Any] = field(default_factory=dict)
    """How pairs of answers are sampled (`rollout`, `data.batch_size`)."""
    against_first: float = 0.5
    """Share of the pairs whose second answer is the first policy's; the others are two of the current one's."""
    held_out: float = 0.05
    """Share of each round's labels that the models are measured on and never learn from."""
    annotator: AnnotatorConfig = field(default_factory=AnnotatorConfig)
    red_team: dict[str, Any] = field(default_factory=dict)
    """How policies are attacked in the rounds that say `red_team`: seeds, templates, how many to keep."""
    reward: dict[str, Any] = field(default_factory=dict)
    """The reward model's training."""
    cost: dict[str, Any] = field(default_factory=dict)
    """The cost model's training."""
    ppo: dict[str, Any] = field(default_factory=dict)
    """PPO-Lag: prompts, rollouts, the multiplier."""
    threshold_share: float | None = None
    """lagrange.threshold = this x the new cost model's mean on held-out answers labelled safe: a limit in its own
    units (default: as `ppo` says)."""
    rounds: list[RoundConfig] = field(default_factory=list)
    """What changes from round to round, one entry for each."""
    evaluate: dict[str, Any] | None = None
    """The report on all policies at the end, by the last round's models unless its judge is another (default: none)."""
