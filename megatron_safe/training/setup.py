"""Roles of a stage, checked against layout, tokenizer and lengths before anything large is built."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from megatron_safe.config import ModelConfig, OptimizerConfig, PpoConfig
from megatron_safe.data.tokenizer import Tokenizer, check_special_tokens
from megatron_safe.errors import UserError
from megatron_safe.huggingface import loading
from megatron_safe.huggingface.folder import is_huggingface
from megatron_safe.huggingface.loading import HuggingFaceModel
from megatron_safe.huggingface.origin import Origin
from megatron_safe.models.llama import architecture, check_model_fits
from megatron_safe.models.roles import Role
from megatron_safe.runtime import Runtime
from megatron_safe.training import checkpoint
from megatron_safe.training.checkpoint import Checkpoint, source_for

# A role may be filled from any of these; a fresh one has none.
Source = Checkpoint | HuggingFaceModel


def ppo_roles(config: PpoConfig, algorithm: str) -> dict[str, tuple[ModelConfig, OptimizerConfig | None]]:
    """The roles of a PPO stage by name: what they start from, and how they learn (None: not at all). Six, five with a
    shared critic or for `ppo`, four without a cost model; critics start from models."""
    wanted = {
        "actor": (config.actor, config.actor_optimizer),
        "reference": (config.reference or config.actor, None),
        "reward_model": (config.reward_model, None),
        "cost_model": (config.cost_model, None),
    }
    if config.critics == "shared":
        return wanted | {"critic": (config.critic or config.reward_model, config.critic_optimizer)}
    wanted["reward_critic"] = config.reward_critic or config.reward_model, config.critic_optimizer
    if algorithm != "ppo":  # where a cost critic's advantages would count for nothing
        wanted["cost_critic"] = config.cost_critic or config.cost_model, config.critic_optimizer
    elif config.cost_model.checkpoint is None:
        del wanted["cost_model"]
    return wanted


@dataclass(frozen=True)
class Plan:
    """What a role is going to be.

    vocab_size: rows of its embedding, at least the tokenizer's. source: whose weights it starts from; None: fresh ones,
    or `checkpoint.load_training` fills it. origin: what its model brought from Hugging Face, however long ago.
    """

    name: str
    model: ModelConfig
    vocab_size: int
    source: Source | None = None
    origin: Origin | None = None

    @property
    def trained(self) -> bool:
        """Whether the source holds the role's head too: a policy's trunk would get a fresh one."""
        return source_for(self.name, self.source.roles, self.source.path) in (self.name, "score")


def resolve_model(model: ModelConfig, name: str, tokenizer: Tokenizer, runtime: Runtime) -> Plan:
    """A role's architecture: its checkpoint's (ours, or a Hugging Face folder) where it names one, else the config's.

    Raises:
        UserError: no such checkpoint, nothing in it that the role can start from, or another tokenizer's vocabulary.
    """
    if model.checkpoint is None:
        return Plan(name, model, tokenizer.vocab_size)
    if is_huggingface(model.checkpoint):
        source = HuggingFaceModel.open(Path(model.checkpoint))
        source_for(name, source.roles, source.path)
        found = architecture(source.description.model)
        del found["vocab_multiple"]
        vocab_size, origin = source.description.vocab_size, source.origin
    else:
        source = checkpoint.find(model.checkpoint, runtime)
        saved = source_for(name, source.roles, source.path)
        found, vocab_size = source.roles[saved]["model"], source.roles[saved]["vocab_size"]
        origin = Origin.of_checkpoint(source.path, saved)
    # Models from Hugging Face may have rows to spare.
    if tokenizer.vocab_size > vocab_size or (origin is None and tokenizer.vocab_size != vocab_size):
        raise UserError(
            f"{name}.checkpoint {source.path}: expected the tokenizer's vocabulary of {tokenizer.vocab_size} tokens, "
            f"found a model of {vocab_size}"
        )
    if origin is not None:
        for warning in check_special_tokens(tokenizer, origin.config, source.path):
            runtime.print(f"warning: {warning}")
    return Plan(name, dataclasses.replace(model, **found), vocab_size, source, origin)


def resolve_role(
    name: str,
    model: ModelConfig,
    tokenizer: Tokenizer,
    runtime: Runtime,
    resume: Checkpoint | None,
    max_length: int = 0,
    section: str | None = None,
) -> Plan:
    """What a role is built as; builds nothing.

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
    plan = resolve_model(model, name, tokenizer, runtime)
    chunks = runtime.parallel.virtual_pipeline_model_parallel_size
    check_model_fits(plan.model, runtime.tp_size, runtime.pp_size, section, chunks)
    if max_length > plan.model.max_sequence_length:
        raise UserError(
            f"{section}.max_sequence_length: expected at least the {max_length} tokens of the longest row, "
            f"found {plan.model.max_sequence_length}"
        )
    return dataclasses.replace(plan, source=None) if resumed else plan


def build_role(
    plan: Plan,
    precision: str,
    seed: int,
    tokenizer: Tokenizer,
    runtime: Runtime,
    optimizer: OptimizerConfig | None = None,
    total_steps: int = 0,
) -> Role:
    """The role that `resolve_role` described, with its source's weights or fresh ones."""
    role = Role(
        plan.name, plan.model, runtime, plan.vocab_size, precision, seed, optimizer, total_steps,
        tokenizer.vocab_size, plan.origin,
    )  # fmt: skip
    if isinstance(plan.source, HuggingFaceModel):
        for chunk in role.chunks:
            loading.load_weights(chunk, plan.model.vocab_multiple, plan.source)
        role.reload_master_weights()
    elif plan.source is not None:
        checkpoint.load_weights(role, plan.source)
    if plan.name == "critic" and plan.source is not None and plan.name not in plan.source.roles:
        # A cost model's output is of no use on another model's trunk: the value of the cost starts at 0.
        role.module.mute_outputs(1)
        role.reload_master_weights()
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
    plan = resolve_role(name, model, tokenizer, runtime, resume, max_length, section)
    return build_role(plan, precision, seed, tokenizer, runtime, optimizer, total_steps)
