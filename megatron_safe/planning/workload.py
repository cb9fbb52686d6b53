"""What a stage's config asks for, in the numbers that memory and time are made of."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from megatron_safe.config import ModelConfig, PpoConfig, StageConfig, SupervisedConfig
from megatron_safe.data.tokenizer import load_tokenizer
from megatron_safe.errors import UserError
from megatron_safe.huggingface.folder import is_huggingface
from megatron_safe.huggingface.loading import HuggingFaceModel
from megatron_safe.models.llama import Head, architecture, check_model_fits, padded_vocab_size
from megatron_safe.models.roles import HEADS, VALUES
from megatron_safe.planning.layout import Layout
from megatron_safe.training.checkpoint import Checkpoint, source_for
from megatron_safe.training.setup import ppo_roles

PPO = ("ppo-lag", "ppo", "ppo-reward-shaping")
SUPERVISED = ("sft", "reward", "cost")


@dataclass(frozen=True)
class RoleShape:
    """A role as the plan sees it. `vocab_rows`: of the embedding, as stored. `trained`: it has gradients and optimizer
    states; `distributed`, `overlap`: how its optimizer shares them (Megatron's DistributedOptimizer, and whether
    gradients travel during the backward pass). `outputs`: of a scalar head, 2 in a critic of reward and cost."""

    name: str
    model: ModelConfig
    head: Head
    vocab_rows: int
    trained: bool = False
    distributed: bool = False
    overlap: bool = False
    outputs: int = 1

    @property
    def judges(self) -> bool:
        """Read at each row's last token, not at every action."""
        return self.name in ("reward_model", "cost_model")


@dataclass(frozen=True)
class Workload:
    """One step of a stage.

    rows: of a rollout batch (or of an optimizer step, in supervised stages), over all ranks; update_rows: of each of
    the `updates` optimizer steps. prompt, answer: mean tokens of a row; max_prompt, max_answer, max_length: of each and
    of a row, at most. slots: answers decoded at once on a data-parallel rank (0: the generator decides).
    demonstrations: rows of the PTX term in each update. actor_scored: one more forward of the actor checks or replaces
    the rollout's log-probabilities.
    """

    stage: str
    roles: tuple[RoleShape, ...]
    precision: str
    rows: int
    update_rows: int
    updates: int
    prompt: float
    answer: float
    max_prompt: int
    max_answer: int
    max_length: int
    pack_tokens: int
    score_pack_tokens: int
    slots: int = 0
    demonstrations: int = 0
    actor_scored: bool = False

    @property
    def length(self) -> float:
        return self.prompt + self.answer

    def role(self, name: str) -> RoleShape | None:
        return next((role for role in self.roles if role.name == name), None)

    @property
    def scored(self) -> list[RoleShape]:
        """Who scores a rollout. Critics that take one step on it do so while they train (experience.single_update)."""
        if not self.generates:
            return []
        wanted = [role for role in self.roles if not role.trained or (role.name != "actor" and self.updates > 1)]
        return ([self.role("actor")] if self.actor_scored else []) + wanted

    @property
    def learners(self) -> list[RoleShape]:
        return [role for role in self.roles if role.trained]

    @property
    def generates(self) -> bool:
        return self.stage in PPO

    @property
    def models(self) -> list[ModelConfig]:
        return [role.model for role in self.roles]


@dataclass(frozen=True)
class Expected:
    """What no config says: of the data, mean tokens of a prompt and of an answer; of the tokenizer, its size. None: the
    longest allowed, and the tokenizer at `tokenizer.path`."""

    mean_prompt_length: float | None = None
    mean_new_tokens: float | None = None
    vocab_size: int | None = None


def layout_of(config: StageConfig, world_size: int) -> Layout:
    """Raises UserError where TP x PP x CP does not divide the world."""
    parallel = config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cp = parallel.context_parallel_size
    if world_size < 1 or world_size % (tp * pp * cp):
        context = f" x context_parallel_size {cp}" if cp > 1 else ""
        raise UserError(
            f"--world_size: expected a positive multiple of tensor_model_parallel_size {tp} x "
            f"pipeline_model_parallel_size {pp}{context} = {tp * pp * cp}, found {world_size}"
        )
    return Layout(
        tp, pp, world_size // (tp * pp * cp), cp, parallel.virtual_pipeline_model_parallel_size,
        parallel.sequence_parallel, parallel.recompute,
    )  # fmt: skip


def workload_of(config: StageConfig, stage: str, layout: Layout, expected: Expected) -> Workload:
    """stage: one of PPO or SUPERVISED. Reads no weights. Raises UserError, naming the field that does not fit."""
    work = (_ppo if stage in PPO else _supervised)(config, stage, expected)
    for role in work.roles:
        check_model_fits(role.model, layout.tp, layout.pp * layout.virtual, role.name)
    if work.update_rows % layout.dp:
        raise UserError(f"plan: {work.update_rows} rows of an optimizer step do not divide into DP {layout.dp}")
    return work


def _ppo(config: PpoConfig, stage: str, expected: Expected) -> Workload:
    tokenizer_size = _vocab_size(config, expected)
    wanted = ppo_roles(config, stage)
    roles = tuple(_role(name, model, optimizer, tokenizer_size) for name, (model, optimizer) in wanted.items())
    ppo, rollout = config.ppo, config.rollout
    return Workload(
        stage=stage,
        roles=roles,
        precision=config.precision,
        rows=ppo.rollout_batch_size,
        update_rows=ppo.mini_batch_size,
        updates=ppo.epochs * max(1, ppo.rollout_batch_size // ppo.mini_batch_size),
        prompt=_mean("mean_prompt_length", expected.mean_prompt_length, rollout.max_prompt_length),
        answer=_mean("mean_new_tokens", expected.mean_new_tokens, rollout.max_new_tokens),
        max_prompt=rollout.max_prompt_length,
        max_answer=rollout.max_new_tokens,
        max_length=rollout.max_prompt_length + rollout.max_new_tokens,
        pack_tokens=ppo.max_tokens_per_micro_batch,
        score_pack_tokens=ppo.max_tokens_per_score_micro_batch,
        slots=rollout.slots,
        demonstrations=ppo.mini_batch_size if ppo.ptx_coeff > 0 else 0,
        actor_scored=rollout.verify_logprobs or ppo.importance_cap is not None,
    )


def _supervised(config: SupervisedConfig, stage: str, expected: Expected) -> Workload:
    role = _role(
        "actor" if stage == "sft" else f"{stage}_model", config.model, config.optimizer, _vocab_size(config, expected)
    )
    batch = config.batch
    answers = 1 if stage == "sft" else 2  # of a pair
    prompt = expected.mean_prompt_length or 0.0
    answer = expected.mean_new_tokens or batch.max_length - prompt
    if prompt + answer > batch.max_length:
        raise UserError(f"plan: mean lengths of {prompt + answer} exceed batch.max_length {batch.max_length}")
    return Workload(
        stage=stage, roles=(role,), precision=batch.precision, rows=answers * batch.global_batch_size,
        update_rows=answers * batch.global_batch_size, updates=1, prompt=prompt, answer=answer,
        max_prompt=batch.max_length, max_answer=batch.max_length, max_length=batch.max_length,
        pack_tokens=batch.max_tokens_per_micro_batch, score_pack_tokens=batch.max_tokens_per_micro_batch,
    )  # fmt: skip


def _role(name: str, model: ModelConfig, optimizer, tokenizer_size: int) -> RoleShape:
    rows = tokenizer_size
    if model.checkpoint is not None:
        model, rows = _at_checkpoint(name, model)
    return RoleShape(
        name, model, HEADS[name], padded_vocab_size(rows, model.vocab_multiple), optimizer is not None,
        optimizer is not None and optimizer.distributed, optimizer is not None and optimizer.overlap_grad_reduce,
        len(VALUES.get(name, (None,))),
    )  # fmt: skip


def _at_checkpoint(name: str, model: ModelConfig) -> tuple[ModelConfig, int]:
    """The architecture that a checkpoint records, and rows of its embedding; its tensors are not read."""
    path = Path(model.checkpoint)
    if is_huggingface(path):
        found = HuggingFaceModel.open(path).description
        own = architecture(found.model) | {"vocab_multiple": model.vocab_multiple}
        return dataclasses.replace(model, **own), found.vocab_size
    states = [path / "state.json", *sorted(path.glob("checkpoints/*/state.json"), reverse=True)]
    newest = next((state.parent for state in states if state.is_file()), None)
    if newest is None:
        raise UserError(
            f"{name}.checkpoint {path}: expected a checkpoint or a run folder, found none; without it the plan takes "
            f"the architecture from {name}'s other fields"
        )
    roles = Checkpoint.read(newest).roles
    saved = roles[source_for(name, roles, newest)]
    return dataclasses.replace(model, **saved["model"]), saved["vocab_size"]


def _vocab_size(config: StageConfig, expected: Expected) -> int:
    if expected.vocab_size is not None:
        return expected.vocab_size
    if not config.tokenizer.path:
        raise UserError("plan: expected tokenizer.path or --vocab_size, found neither")
    return load_tokenizer(config.tokenizer.path, config.tokenizer.template).vocab_size


def _mean(name: str, found: float | None, most: int) -> float:
    if found is None:
        return float(most)
    if not 1 <= found <= most:
        raise UserError(f"--{name}: expected a number from 1 to {most}, found {found}")
    return found
