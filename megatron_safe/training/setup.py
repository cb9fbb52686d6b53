"""Roles of a stage, checked against layout, tokenizer and lengths before anything large is built."""

from megatron_safe.config import ModelConfig, OptimizerConfig
from megatron_safe.data.tokenizer import Tokenizer
from megatron_safe.errors import UserError
from megatron_safe.models.llama import check_model_fits
from megatron_safe.models.roles import Role
from megatron_safe.runtime import Runtime
from megatron_safe.training.checkpoint import Checkpoint, load_weights, resolve_model


def resolve_role(
    name: str,
    model: ModelConfig,
    tokenizer: Tokenizer,
    runtime: Runtime,
    resume: Checkpoint | None,
    max_length: int = 0,
    section: str | None = None,
) -> tuple[ModelConfig, Checkpoint | None]:
    """What a role is built as, and the checkpoint whose weights it starts from; builds nothing.

    Args:
        resume: the run's own checkpoint. Roles that it holds take their architecture from it and start from None:
            `checkpoint.load_training` fills all of them together.
        max_length: the longest row this stage will give it.
        section: the config's section that says what the role is, for messages (default: its name).

    Raises:
        UserError: naming the field that does not fit.
    """
    section = section or name
    resumed = resume is not None and name in resume.roles
    if resumed:
        model = ModelConfig(checkpoint=str(resume.path))
    model, source = resolve_model(model, name, tokenizer.vocab_size, runtime)
    check_model_fits(model, runtime.tp_size, runtime.pp_size, section)
    if max_length > model.max_sequence_length:
        raise UserError(
            f"{section}.max_sequence_length: expected at least the {max_length} tokens of the longest row, "
            f"found {model.max_sequence_length}"
        )
    return model, None if resumed else source


def build_role(
    name: str,
    model: ModelConfig,
    source: Checkpoint | None,
    precision: str,
    seed: int,
    tokenizer: Tokenizer,
    runtime: Runtime,
    optimizer: OptimizerConfig | None = None,
    total_steps: int = 0,
) -> Role:
    """The role that `resolve_role` described, with its checkpoint's weights or fresh ones."""
    role = Role(name, model, runtime, tokenizer.vocab_size, precision, seed, optimizer, total_steps)
    if source is not None:
        load_weights(role, source)
    return role


def make_role(
    name: str,
    model: ModelConfig,
    precision: str,
    seed: int,
    tokenizer: Tokenizer,
    runtime: Runtime,
    resume: Checkpoint | None,
    optimizer: OptimizerConfig | None = None,
    total_steps: int = 0,
    max_length: int = 0,
    section: str | None = None,
) -> Role:
    """`resolve_role` and `build_role`, for a stage of one role."""
    model, source = resolve_role(name, model, tokenizer, runtime, resume, max_length, section)
    return build_role(name, model, source, precision, seed, tokenizer, runtime, optimizer, total_steps)
