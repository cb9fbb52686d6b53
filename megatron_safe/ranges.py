"""Which values each setting may take, checked as soon as a config is read: before a process group or a model starts.

What depends on more than one setting, on data or on the layout is checked where it is used.
"""

import dataclasses
import math
from collections.abc import Callable

from megatron_safe.config import (
    BatchConfig,
    CertificateConfig,
    EndpointConfig,
    GenerateDataConfig,
    LagrangeConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PpoTrainingConfig,
    PreferenceTrainingConfig,
    RedTeamingConfig,
    RolloutConfig,
    RunConfig,
    ScoreDataConfig,
    SftTrainingConfig,
)
from megatron_safe.errors import UserError

Range = tuple[str, Callable[[float], bool]]
"""What is expected, in words, and whether a value is that. No range holds NaN."""


def _at_least(least: int, meaning: str = "") -> Range:
    return f"{least}{meaning} or more", lambda value: least <= value < math.inf


_POSITIVE: Range = ("a number above 0", lambda value: 0 < value < math.inf)
_LIMIT: Range = ("a number above 0, or .inf for no limit", lambda value: value > 0)
_SHARE: Range = ("a number from 0 to 1", lambda value: 0 <= value <= 1)
_INSIDE: Range = ("a number above 0 and below 1", lambda value: 0 < value < 1)
_DECAY: Range = ("a number from 0 to below 1", lambda value: 0 <= value < 1)

RANGES: dict[type, dict[str, Range]] = {
    RunConfig: {
        "seed": ("a whole number from 0 to 2^63 - 1", lambda value: 0 <= value < 2**63),
        "save_every": _at_least(0),
        "keep_last": _at_least(0),
        "stop_after": _at_least(0),
    },
    ParallelConfig: {
        "tensor_model_parallel_size": _at_least(1),
        "pipeline_model_parallel_size": _at_least(1),
        "virtual_pipeline_model_parallel_size": _at_least(1),
        "context_parallel_size": _at_least(1),
        "timeout_seconds": _POSITIVE,
    },
    ModelConfig: {
        "hidden_size": _at_least(1),
        "num_query_groups": _at_least(1),
        "rotary_base": _POSITIVE,
        "norm_epsilon": _POSITIVE,
        "max_sequence_length": _at_least(2),
        "init_std": _at_least(0),
        "head_dim": _at_least(1),
        "sliding_window": _at_least(1),
        "rope_factor": _POSITIVE,
        "rope_low_freq_factor": _POSITIVE,
        "rope_high_freq_factor": _POSITIVE,
        "rope_original_max_position": _at_least(1),
        "score_std": _POSITIVE,
    },
    OptimizerConfig: {
        "lr": _at_least(0),
        "min_lr": _at_least(0),
        "warmup_steps": _at_least(0),
        "weight_decay": _at_least(0),
        "beta1": _DECAY,
        "beta2": _DECAY,
        "eps": _POSITIVE,
        "clip_grad": _at_least(0, " (no clipping)"),
    },
    BatchConfig: {"max_length": _at_least(2), "max_tokens_per_micro_batch": _at_least(1)},
    SftTrainingConfig: {"steps": _at_least(1)},
    PreferenceTrainingConfig: {"steps": _at_least(1), "score_l2": _at_least(0)},
    RolloutConfig: {
        "max_new_tokens": _at_least(1),
        "max_prompt_length": _at_least(1),
        "temperature": _at_least(0, " (greedy)"),
        "top_k": _at_least(0, " (all)"),
        "top_p": ("a number above 0 and up to 1", lambda value: 0 < value <= 1),
        "slots": _at_least(0, " (automatic)"),
    },
    PpoTrainingConfig: {
        "steps": _at_least(1),
        "max_tokens_per_micro_batch": _at_least(1),
        "max_tokens_per_score_micro_batch": _at_least(1),
        "epochs": _at_least(1),
        "critic_warmup_steps": _at_least(0),
        "kl_coeff": _at_least(0),
        "clip_ratio": _POSITIVE,
        "importance_cap": _at_least(1),
        "clip_value": _LIMIT,
        "score_clip": _LIMIT,
        "gamma": _SHARE,
        "gae_lambda": _SHARE,
        "missing_eos_penalty": _at_least(0),
        "ptx_coeff": _at_least(0),
        "red_team_share": _SHARE,
        "shaping_coeff": _at_least(0),
    },
    LagrangeConfig: {"episode_cost_window": _at_least(1)},
    GenerateDataConfig: {"samples_per_prompt": _at_least(1)},
    RedTeamingConfig: {"keep": _at_least(0), "max_per_seed": _at_least(0), "max_similarity": _SHARE},
    CertificateConfig: {
        "harmful_rate": _INSIDE,
        "mean_cost": ("a finite number", math.isfinite),
        "confidence": _INSIDE,
    },
    ScoreDataConfig: {"max_length": _at_least(2)},
    EndpointConfig: {
        "input_price": _at_least(0, " dollars per million tokens"),
        "output_price": _at_least(0, " dollars per million tokens"),
        "max_dollars": _at_least(0),
        "max_parallel": _at_least(1),
        "timeout_seconds": _POSITIVE,
        "retries": _at_least(0),
        "backoff_seconds": _at_least(0),
    },
}


def check_ranges(config, place: str = "") -> None:
    """Raise UserError, naming section and field, for the first setting of a stage's config that is out of range.

    place: what stands before the names of the config's own fields.
    """
    for outer in dataclasses.fields(config):
        section, inside = getattr(config, outer.name), f"{place}{outer.name}."
        if dataclasses.is_dataclass(section):
            check_ranges(section, inside)
        for name, (expected, holds) in RANGES.get(type(section), {}).items():
            value = getattr(section, name)
            if value is not None and not holds(value):
                raise UserError(f"{inside}{name}: expected {expected}, found {value}")
        if isinstance(section, OptimizerConfig) and section.min_lr > section.lr:
            raise UserError(f"{inside}min_lr: expected at most lr {section.lr}, found {section.min_lr}")
        if isinstance(section, OptimizerConfig) and section.overlap_param_gather:
            for name in ("distributed", "overlap_grad_reduce"):
                if not getattr(section, name):
                    raise UserError(f"{inside}overlap_param_gather: expected {name} to be true too, found false")
