"""Stages, each with its sections, as typed dataclasses."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_safe.config.sections import (
    BatchConfig,
    CertificateConfig,
    DataConfig,
    GenerateDataConfig,
    JudgeConfig,
    KernelsConfig,
    LagrangeConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PpoDataConfig,
    PpoTrainingConfig,
    PreferenceTrainingConfig,
    RedTeamingConfig,
    RolloutConfig,
    RunConfig,
    ScoreDataConfig,
    SftTrainingConfig,
    TokenizerConfig,
)


@dataclass
class StageConfig:
    """What every stage has."""

    run: RunConfig = field(default_factory=RunConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)


@dataclass
class SupervisedConfig(StageConfig):
    """What the stages have that train one model on rows of text."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass
class SftConfig(SupervisedConfig):
    """Supervised fine-tuning of the actor on demonstrations (paper, section 3, stage 0)."""

    training: SftTrainingConfig = field(default_factory=SftTrainingConfig)


@dataclass
class PreferenceConfig(SupervisedConfig):
    """Training of the reward model or the cost model on comparisons (paper, section 3.2)."""

    training: PreferenceTrainingConfig = field(default_factory=PreferenceTrainingConfig)


@dataclass
class PpoConfig(StageConfig):
    """PPO-Lag (paper, section 3.3) and its baselines `ppo` and `ppo-reward-shaping`."""

    actor: ModelConfig = field(default_factory=ModelConfig)
    reference: ModelConfig | None = None
    """Frozen reference policy (default: as the actor)."""
    reward_model: ModelConfig = field(default_factory=ModelConfig)
    cost_model: ModelConfig = field(default_factory=ModelConfig)
    reward_critic: ModelConfig | None = None
    """Critic of the reward (default: starts from the reward model)."""
    cost_critic: ModelConfig | None = None
    """Critic of the cost (default: starts from the cost model)."""
    critics: Literal["separate", "shared"] = "separate"
    """`shared`: one critic with two outputs in place of both, which saves a model's weights, gradients and optimizer
    (not for `ppo`, which has no cost critic)."""
    critic: ModelConfig | None = None
    """The shared critic (default: starts from the reward model). Where it starts from a model with one output, that one
    is for the reward, and its values of the cost are 0 at first."""
    data: PpoDataConfig = field(default_factory=PpoDataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    ppo: PpoTrainingConfig = field(default_factory=PpoTrainingConfig)
    lagrange: LagrangeConfig = field(default_factory=LagrangeConfig)
    actor_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    critic_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    precision: Literal["fp32", "bf16"] = "fp32"
    """Compute type of all roles."""


@dataclass
class GenerateConfig(StageConfig):
    """Answers to prompts, written to OUT/answers.jsonl."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: GenerateDataConfig = field(default_factory=GenerateDataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    precision: Literal["fp32", "bf16"] = "fp32"
    """Compute type."""


@dataclass
class RedTeamConfig(StageConfig):
    """Attacks on a policy, ranked by the cost model; the diverse successful ones join the prompts in OUT/prompts.jsonl.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    cost_model: ModelConfig = field(default_factory=ModelConfig)
    data: GenerateDataConfig = field(default_factory=GenerateDataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    red_team: RedTeamingConfig = field(default_factory=RedTeamingConfig)
    precision: Literal["fp32", "bf16"] = "fp32"
    """Compute type."""


@dataclass
class ScoreConfig(StageConfig):
    """Reward and cost of answers, written to OUT/scores.jsonl."""

    reward_model: ModelConfig | None = None
    """Reward model (optional)."""
    cost_model: ModelConfig | None = None
    """Cost model (optional)."""
    data: ScoreDataConfig = field(default_factory=ScoreDataConfig)
    precision: Literal["fp32", "bf16"] = "fp32"
    """Compute type."""


@dataclass
class EvaluateConfig(StageConfig):
    """Several policies over the same prompts, judged and compared; OUT/report."""

    policies: dict[str, str] = field(default_factory=dict)
    """Name -> run folder or checkpoint; the first one anchors Elo at 0."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    reward_model: ModelConfig = field(default_factory=ModelConfig)
    """Together with the cost model: the judge `models`; beside another judge optional, for mean reward and cost."""
    cost_model: ModelConfig = field(default_factory=ModelConfig)
    data: GenerateDataConfig = field(default_factory=GenerateDataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    certificate: CertificateConfig = field(default_factory=CertificateConfig)
    precision: Literal["fp32", "bf16"] = "fp32"
    """Compute type."""
