"""Every setting there is, as typed dataclasses: one per section, one per stage.

A stage is configured by one YAML file plus dotted overrides (`--ppo.kl_coeff 0.1`), which `cli.parse` reads.
"""

import dataclasses

from megatron_safe.config.rounds import AnnotatorConfig, RoundConfig, RoundsConfig
from megatron_safe.config.sections import (
    BatchConfig,
    CertificateConfig,
    DataConfig,
    EndpointConfig,
    GenerateDataConfig,
    JudgeConfig,
    KernelsConfig,
    LagrangeConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PeopleConfig,
    PpoDataConfig,
    PpoTrainingConfig,
    PreferenceTrainingConfig,
    ProgramConfig,
    RedTeamingConfig,
    RolloutConfig,
    RunConfig,
    ScoreDataConfig,
    SftTrainingConfig,
    TokenizerConfig,
)
from megatron_safe.config.stages import (
    EvaluateConfig,
    GenerateConfig,
    PpoConfig,
    PreferenceConfig,
    RedTeamConfig,
    ScoreConfig,
    SftConfig,
    StageConfig,
    SupervisedConfig,
)

__all__ = [
    "AnnotatorConfig",
    "BatchConfig",
    "CertificateConfig",
    "DataConfig",
    "EndpointConfig",
    "EvaluateConfig",
    "GenerateConfig",
    "GenerateDataConfig",
    "JudgeConfig",
    "KernelsConfig",
    "LagrangeConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PeopleConfig",
    "PpoConfig",
    "PpoDataConfig",
    "PpoTrainingConfig",
    "PreferenceConfig",
    "PreferenceTrainingConfig",
    "ProgramConfig",
    "RedTeamConfig",
    "RedTeamingConfig",
    "RolloutConfig",
    "RoundConfig",
    "RoundsConfig",
    "RunConfig",
    "STAGES",
    "ScoreConfig",
    "ScoreDataConfig",
    "SftConfig",
    "SftTrainingConfig",
    "StageConfig",
    "SupervisedConfig",
    "TokenizerConfig",
    "to_dict",
]

STAGES: dict[str, type] = {
    "sft": SftConfig,
    "reward": PreferenceConfig,
    "cost": PreferenceConfig,
    "ppo-lag": PpoConfig,
    "ppo": PpoConfig,
    "ppo-reward-shaping": PpoConfig,
    "generate": GenerateConfig,
    "score": ScoreConfig,
    "evaluate": EvaluateConfig,
    "red-team": RedTeamConfig,
    "rounds": RoundsConfig,
}


def to_dict(config) -> dict:
    """The resolved config as plain data, as written to OUT/config.yaml."""
    return dataclasses.asdict(config)
