"""Roles of a stage, checked against layout, tokenizer and lengths before anything large is built."""

from megatron_safe.config import ModelConfig, OptimizerConfig
from megatron_safe.data.tokenizer import Tokenizer
from megatron_safe.errors import UserError
from megatron_safe.models.llama import check_model_fits
from megatron_safe.models.roles import Role
from megatron_safe.runtime import Runtime
from megatron_safe.training.checkpoint import Checkpoint, load_weights, resolve_model


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
) -> Role:
    """A role with the weights it starts from: its checkpoint's, or fresh ones.

    Args:
        resume: the run's own checkpoint. Roles that it holds take their architecture from it and are NOT filled here:
            `checkpoint.load_training` does that for all of them together.
        max_length: the longest row this stage will give it.

    Raises:
        UserError: naming the field that does not fit.
    """
    resumed = resume is not None and name in resume.roles
    if resumed:
        model = ModelConfig(checkpoint=str(resume.path))
    model, source = resolve_model(model, name, tokenizer.vocab_size, runtime)
    check_model_fits(model, runtime.tp_size, runtime.pp_size, name)
    if max_length > model.max_sequence_length:
        raise UserError(
            f"{name}.max_sequence_length: expected at least the {max_length} tokens of the longest row, "
            f"found {model.max_sequence_length}"
        )
    role = Role(name, model, runtime, tokenizer.vocab_size, precision, seed, optimizer, total_steps)
    if source is not None and not resumed:
        load_weights(role, source)
    return role
