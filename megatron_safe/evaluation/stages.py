"""The stages `generate` and `score`, and what they share with `evaluate` and `red-team`."""

import dataclasses
import gc
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from megatron_safe.config import (
    EvaluateConfig,
    GenerateConfig,
    ModelConfig,
    RedTeamConfig,
    ScoreConfig,
)
from megatron_safe.data.datasets import PromptDataset
from megatron_safe.data.files import write_lines
from megatron_safe.data.mixture import read
from megatron_safe.data.records import Prompt
from megatron_safe.data.rows import read_rows
from megatron_safe.data.tokenizer import Tokenizer, load_tokenizer
from megatron_safe.errors import UserError
from megatron_safe.evaluation.answers import Answer, each_turn, generate_answers, score_answers
from megatron_safe.models.llama import check_model_fits
from megatron_safe.models.roles import Role
from megatron_safe.runtime import Runtime
from megatron_safe.training.run import check_stage, write_config
from megatron_safe.training.setup import make_role, resolve_model


def generate(config: GenerateConfig, runtime: Runtime) -> None:
    """Write OUT/answers.jsonl: the fields of `Answer`, in the order of the prompts."""
    tokenizer = load_tokenizer(config.tokenizer.path, config.tokenizer.template)
    prompts = prompts_to_answer(config, tokenizer, runtime)
    longest = config.rollout.max_prompt_length + config.rollout.max_new_tokens
    check_model("model", "actor", config.model, tokenizer, runtime, longest)
    out = claim_folder(config, "generate", "answers.jsonl", runtime)
    answers = answer(config, config.model, prompts, tokenizer, runtime)
    write_rows(out / "answers.jsonl", map(dataclasses.asdict, answers), runtime)
    runtime.print(f"{len(answers)} answers -> {out / 'answers.jsonl'}")


def score(config: ScoreConfig, runtime: Runtime) -> None:
    """Write OUT/scores.jsonl: prompt, response, and `reward`, `cost` by the models given, in the order of the rows.

    With data.turns all a dialogue has a row for each of the assistant's turns, oldest first. `history` is what was said
    before the turn, and `turn` how many exchanges that is.
    A score is null where the prompt is too long for data.max_length, or the model diverged.
    """
    tokenizer = load_tokenizer(config.tokenizer.path, config.tokenizer.template)
    check_batch_size(config.data.batch_size, runtime)
    models = {"reward": config.reward_model, "cost": config.cost_model}
    models = {name: model for name, model in models.items() if model is not None}
    if not models:
        raise UserError("reward_model.checkpoint, cost_model.checkpoint: expected at least one of them, found none")
    answers = read_answers(config.data.answers)
    if config.data.turns == "all":
        answers = [turn for answer in answers for turn in each_turn(answer)]
    for name, model in models.items():
        check_model(f"{name}_model", f"{name}_model", model, tokenizer, runtime, config.data.max_length)
    out = claim_folder(config, "score", "scores.jsonl", runtime)
    roles = {name: load(f"{name}_model", model, config, tokenizer, runtime) for name, model in models.items()}
    scores = score_answers(
        roles, answers, tokenizer, config.tokenizer.template, config.data.max_length, config.data.batch_size
    )
    rows = (
        {
            "prompt": answer.prompt, "response": answer.response, "history": answer.history,
            "turn": len(answer.history),
        }
        | {name: value if math.isfinite(value) else None for name, value in zip(scores, values, strict=True)}
        for answer, *values in zip(answers, *scores.values(), strict=True)
    )  # fmt: skip
    write_rows(out / "scores.jsonl", rows, runtime)
    runtime.print(f"{len(answers)} answers scored -> {out / 'scores.jsonl'}")


def read_answers(paths: list[str]) -> list[Answer]:
    """Rows with `prompt`, `response` (may be empty) and optionally `ended` (bool, default true), `history`, `red_team`
    and `category`.

    Raises UserError as `data.sources.read_demonstrations`.
    """
    return [
        Answer(
            row.text("prompt"),
            row.text("response", may_be_empty=True),
            ended=row.flag("ended") if "ended" in row.fields else True,
            red_team=row.flag("red_team") if "red_team" in row.fields else False,
            category=row.text("category") if row.has("category") else None,
            history=row.history(),
        )
        for row in read_rows(paths)
    ]


# What can be wrong, before anything large is loaded.


def prompts_to_answer(
    config: GenerateConfig | EvaluateConfig | RedTeamConfig, tokenizer: Tokenizer, runtime: Runtime
) -> list[Prompt]:
    """What is short enough of the prompts; says what is not. Raises UserError for bad data or settings."""
    check_batch_size(config.data.batch_size, runtime)
    mixture = read(
        "prompts", "data.prompts", config.data.prompts, config.data.on_bad_row, weighted=False, say=runtime.print
    )
    prompts = PromptDataset(
        mixture.records, tokenizer, config.tokenizer.template, config.rollout.max_prompt_length
    )
    runtime.print(prompts.report())
    return prompts.shortened()


def check_batch_size(batch_size: int, runtime: Runtime) -> None:
    if batch_size <= 0 or batch_size % runtime.dp_size:
        raise UserError(
            f"data.batch_size: expected a positive multiple of data-parallel size {runtime.dp_size}, found {batch_size}"
        )


def check_model(
    field: str, role: str, model: ModelConfig, tokenizer: Tokenizer, runtime: Runtime, longest: int
) -> None:
    """Raise UserError unless the checkpoint is whole, was trained as `role`, and fits layout, tokenizer and rows.

    Training may start a reward or cost model from a policy's trunk; its fresh head would score at random here.
    """
    if model.checkpoint is None:
        raise UserError(f"{field}.checkpoint: expected the run folder of its training, found none")
    plan = resolve_model(model, role, tokenizer, runtime)
    if not plan.trained:
        raise UserError(f"{field} {plan.source.path}: expected a trained {role}, found {', '.join(plan.source.roles)}")
    chunks = runtime.parallel.virtual_pipeline_model_parallel_size
    check_model_fits(plan.model, runtime.tp_size, runtime.pp_size, field, chunks)
    if longest > plan.model.max_sequence_length:
        raise UserError(
            f"{field} {plan.source.path}: expected room for the {longest} tokens of the longest row, "
            f"found max_sequence_length {plan.model.max_sequence_length}"
        )


# The run folder.


def claim_folder(config, stage: str, result: str, runtime: Runtime) -> Path:
    """The run folder with the resolved config in it.

    Raises:
        UserError: it holds another stage's run, or this stage's `result` and `run.resume` is "no".
    """
    folder = Path(config.run.out)
    check_stage(folder, stage)
    if (folder / result).exists() and config.run.resume == "no":
        raise UserError(
            f"run.out {folder}: holds {result} already; choose another folder, or --run.resume auto to make it anew"
        )
    runtime.barrier()  # every rank has looked before rank 0 writes
    try:
        if runtime.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            write_config(folder, stage, config)
    except OSError as error:
        raise UserError(f"run.out {folder}: cannot be written: {error}") from error
    return folder


def write_rows(path: Path, rows: Iterable[Mapping], runtime: Runtime) -> None:
    """JSON Lines on rank 0, published by rename: a file that can be seen is whole."""
    if runtime.is_main:
        write_lines(path, (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows))


# Models, which are here to be read only.


def load(
    name: str,
    model: ModelConfig,
    config: GenerateConfig | ScoreConfig | EvaluateConfig | RedTeamConfig,
    tokenizer: Tokenizer,
    runtime: Runtime,
) -> Role:
    return make_role(name, model, config.precision, config.run.seed, tokenizer, runtime, resume=None)


def answer(
    config: GenerateConfig | EvaluateConfig,
    policy: ModelConfig,
    prompts: list[Prompt],
    tokenizer: Tokenizer,
    runtime: Runtime,
) -> list[Answer]:
    """The policy's answers, its weights freed again: the next one may need their room."""
    actor = load("actor", policy, config, tokenizer, runtime)
    answers = generate_answers(
        actor,
        prompts,
        tokenizer,
        config.tokenizer.template,
        config.rollout,
        config.data.batch_size,
        config.data.samples_per_prompt,
        config.run.seed,
    )
    del actor
    gc.collect()  # Megatron's modules refer to each other in circles
    torch.cuda.empty_cache()
    return answers
