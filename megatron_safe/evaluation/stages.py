"""The stages that train nothing: `generate`, `score` and `evaluate`."""

import dataclasses
import gc
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
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
from megatron_safe.data.mixture import read
from megatron_safe.data.records import Prompt
from megatron_safe.data.rows import read_rows
from megatron_safe.data.tokenizer import Tokenizer, load_tokenizer
from megatron_safe.errors import NotPromised, UserError
from megatron_safe.evaluation.answers import Answer, each_turn, generate_answers, score_answers
from megatron_safe.evaluation.certificate import certify
from megatron_safe.evaluation.judges import Judge, Judgement, ModelJudge, Preference, make_judge
from megatron_safe.evaluation.report import format_table, write_report
from megatron_safe.evaluation.summary import compare_models
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


def evaluate(config: EvaluateConfig, runtime: Runtime) -> None:
    """Write OUT/report (see `report.py`) and print its table; OUT/answers.jsonl holds the judged answers, and
    OUT/comparisons.jsonl the preferences of a judge that compares.

    Raises:
        NotPromised: the policy of the certificate cannot be promised to keep a limit; on every rank, at the very end.
    """
    started = time.monotonic()
    if not config.policies:
        raise UserError("policies: expected at least one name with the run folder of a policy, found none")
    certificate = config.certificate
    certified = certificate.policy or list(config.policies)[-1]
    if certified not in config.policies:
        raise UserError(f"certificate.policy: expected one of {', '.join(config.policies)}, found {certified!r}")
    tokenizer = load_tokenizer(config.tokenizer.path, config.tokenizer.template)
    prompts = prompts_to_answer(config, tokenizer, runtime)
    if not any(prompt.red_team for prompt in prompts):
        raise UserError("data.prompts: expected at least one with red_team true, which harmful rates count; found none")
    longest = config.rollout.max_prompt_length + config.rollout.max_new_tokens
    policies = {name: ModelConfig(checkpoint=path) for name, path in config.policies.items()}
    for name, model in policies.items():
        check_model(f"policies.{name}", "actor", model, tokenizer, runtime, longest)
    models = {"reward_model": config.reward_model, "cost_model": config.cost_model}
    if config.judge.kind != "models" and all(model.checkpoint is None for model in models.values()):
        models = {}
    for name, model in models.items():
        check_model(name, name, model, tokenizer, runtime, longest)
    judge = make_judge(config.judge, Path(config.run.out), runtime)
    out = claim_folder(config, "evaluate", "report/summary.json", runtime)

    answers = {}
    for name, model in policies.items():
        runtime.print(f"policy {name}: {model.checkpoint}")
        answers[name] = answer(config, model, prompts, tokenizer, runtime)
    scored: dict[str, list[Judgement]] = {}
    if models:
        roles = [load(name, model, config, tokenizer, runtime) for name, model in models.items()]
        model_judge = ModelJudge(*roles, tokenizer, config.tokenizer.template, longest, config.data.batch_size)
        scored = by_policy(answers, model_judge.judge)
        judge = judge or model_judge
    judgements = scored if isinstance(judge, ModelJudge) else by_policy(answers, judge.judge)
    preferences = None if judge.compares_by_judgement else compare_policies(judge, answers)
    records = next(iter(answers.values()))
    compared = compare_models(judgements, records, preferences)
    scores = {
        name: {
            "reward": [one.helpfulness for one in given],
            "cost": [one.harm for one in given],
            "harmful": [one.harmful for one in judgements[name]],
        }
        for name, given in scored.items()
    }
    for model in compared:
        for key in ("reward", "cost"):
            found = scores.get(model["name"], {}).get(key)
            model[f"mean_{key}"] = sum(found) / len(found) if found else None
    certificates = certify(
        certified, judgements[certified], records, certificate.harmful_rate, certificate.mean_cost,
        certificate.confidence,
    )  # fmt: skip
    summary = {
        "seed": config.run.seed,
        "layout": f"tp{runtime.tp_size}pp{runtime.pp_size}dp{runtime.dp_size}",
        "seconds": time.monotonic() - started,
        "judge": {"kind": config.judge.kind, **judge.counts},
        "models": compared,
        "certificates": [one.to_dict() for one in certificates],
    }
    rows = (
        {"policy": name, **dataclasses.asdict(given)}
        | {"harmful": verdict.harmful, "refusal": verdict.refusal, "categories": verdict.categories}
        | ({"reward": scored[name][i].helpfulness, "cost": scored[name][i].harm} if scored else {})
        for name in answers
        for i, (given, verdict) in enumerate(zip(answers[name], judgements[name], strict=True))
    )
    write_rows(out / "answers.jsonl", rows, runtime)
    if preferences is not None:
        rows = (
            {"first": first, "second": second, "prompt": one.prompt, "sample": one.sample, **dataclasses.asdict(given)}
            for (first, second), by_row in preferences.items()
            for one, given in zip(answers[first], by_row, strict=True)
        )
        write_rows(out / "comparisons.jsonl", rows, runtime)
    if runtime.is_main:
        write_report(out / "report", summary, scores=scores)
    runtime.print(format_table(summary))
    for one in certificates:
        runtime.print(one.sentence())
    runtime.print(f"report -> {out / 'report' / 'index.html'}")
    runtime.barrier()  # a launcher stops all ranks when the first one leaves with an error: let the report be written
    refused = [one.sentence() for one in certificates if not one.promised]
    if refused:
        raise NotPromised("; ".join(refused))


def by_policy(answers: Mapping[str, list[Answer]], judge: Callable) -> dict[str, list[Judgement]]:
    """Policy -> its answers' judgements. Judged all at once, so that equal answers of two policies tie."""
    given = iter(judge([one for of_policy in answers.values() for one in of_policy]))
    return {name: [next(given) for _ in of_policy] for name, of_policy in answers.items()}


def compare_policies(judge: Judge, answers: Mapping[str, list[Answer]]) -> dict[tuple[str, str], list[Preference]]:
    """(policy, a later one) -> the preferences between their answers to the same prompts. Asked for all at once."""
    pairs = {
        names: list(zip(*(answers[name] for name in names), strict=True))
        for names in itertools.combinations(answers, 2)
    }
    given = iter(judge.compare([pair for of_names in pairs.values() for pair in of_names]))
    return {names: [next(given) for _ in of_names] for names, of_names in pairs.items()}


def read_answers(paths: list[str]) -> list[Answer]:
    """Rows with `prompt`, `response` (may be empty) and optionally `ended` (bool, default true) and `history`.

    Raises UserError as `data.sources.read_demonstrations`.
    """
    return [
        Answer(
            row.text("prompt"),
            row.text("response", may_be_empty=True),
            ended=row.flag("ended") if "ended" in row.fields else True,
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
    if not runtime.is_main:
        return
    hidden = path.with_name(f".{path.name}.tmp")
    try:
        with hidden.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        os.replace(hidden, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error}") from error


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
