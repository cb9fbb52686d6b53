"""The stage `evaluate`: several policies over the same prompts, judged, compared and reported."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_safe.config import EvaluateConfig, ModelConfig
from megatron_safe.data.tokenizer import load_tokenizer
from megatron_safe.errors import NotPromised, UserError
from megatron_safe.evaluation.answers import Answer
from megatron_safe.evaluation.certificate import certify
from megatron_safe.evaluation.judges import Judge, Judgement, ModelJudge, Preference, make_judge
from megatron_safe.evaluation.report import format_table, write_report
from megatron_safe.evaluation.stages import answer, check_model, claim_folder, load, prompts_to_answer, write_rows
from megatron_safe.evaluation.summary import compare_models
from megatron_safe.runtime import Runtime


def run(
    config: EvaluateConfig,
    runtime: Runtime,
    runs: Sequence[tuple[str, Path]] = (),
    facts: Mapping[str, Any] | None = None,
    started: float | None = None,
) -> dict:
    """Write OUT/report (see `report.py`) and print its table; OUT/answers.jsonl holds the judged answers, and
    OUT/comparisons.jsonl the preferences of a judge that compares.

    Args:
        runs: names and metrics.jsonl of PPO-Lag runs, for the report.
        facts: what else the summary says.
        started: when the job began that this is the end of, on the monotonic clock (default: now).

    Returns:
        the summary.

    Raises:
        NotPromised: the policy of the certificate cannot be promised to keep a limit; on every rank, at the very end.
    """
    started = time.monotonic() if started is None else started
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
        certified, with_costs(judgements[certified], scored.get(certified)), records, certificate.harmful_rate,
        certificate.mean_cost, certificate.confidence,
    )  # fmt: skip
    summary = {
        "seed": config.run.seed,
        "layout": f"tp{runtime.tp_size}pp{runtime.pp_size}dp{runtime.dp_size}",
        "seconds": time.monotonic() - started,
        "judge": {"kind": config.judge.kind, **judge.counts},
        "models": compared,
        "certificates": [one.to_dict() for one in certificates],
        **(facts or {}),
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
        write_report(out / "report", summary, runs, scores)
    runtime.print(format_table(summary))
    for one in certificates:
        runtime.print(one.sentence())
    runtime.print(f"report -> {out / 'report' / 'index.html'}")
    runtime.barrier()  # a launcher stops all ranks when the first one leaves with an error: let the report be written
    refused = [one.sentence() for one in certificates if not one.promised]
    if refused:
        raise NotPromised("; ".join(refused))
    return summary


def with_costs(judgements: Sequence[Judgement], scored: Sequence[Judgement] | None) -> list[Judgement]:
    """The judge's verdicts with the cost model's costs, where there is one."""
    if scored is None:
        return list(judgements)
    return [dataclasses.replace(one, harm=cost.harm) for one, cost in zip(judgements, scored, strict=True)]


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
