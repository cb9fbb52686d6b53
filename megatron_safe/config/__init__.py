"""Every setting there is, as typed dataclasses: one per section, one per stage.

A stage is configured by one YAML file plus dotted overrides (`--ppo.kl_coeff 0.1`), which `cli.parse` reads.
"""

from megatron_safe.config.sections import (
    BatchConfig,
    DataConfig,
    GenerateDataConfig,
    KernelsConfig,
    LagrangeConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PpoDataConfig,
    PpoTrainingConfig,
    PreferenceTrainingConfig,
    RolloutConfig,
    RunConfig,
    ScoreDataConfig,
    SftTrainingConfig,
    TokenizerConfig,
)
from megatron_safe.config.stages import (
    STAGES,
    EvaluateConfig,
    GenerateConfig,
    PpoConfig,
    PreferenceConfig,
    ScoreConfig,
    SftConfig,
    StageConfig,
    SupervisedConfig,
    to_dict,
)

__all__ = [
    "BatchConfig",
    "DataConfig",
    "EvaluateConfig",
    "GenerateConfig",
    "GenerateDataConfig",
    "KernelsConfig",
    "LagrangeConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PpoConfig",
    "PpoDataConfig",
    "PpoTrainingConfig",
    "PreferenceConfig",
    "PreferenceTrainingConfig",
    "RolloutConfig",
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
