"""Who labels a round's pairs of answers: people through Label Studio, a judge, or a program of the user's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_safe.annotation import read_annotations, task_of, write_tasks
from megatron_safe.config import AnnotatorConfig
from megatron_safe.errors import UserError, Waiting
from megatron_safe.evaluation.judges import make_judge
from megatron_safe.programs import Program
from megatron_safe.rounds.pairs import as_answers
from megatron_safe.runtime import Runtime


def annotate(
    config: AnnotatorConfig, pairs: Sequence[dict[str, Any]], folder: Path, seed: int, runtime: Runtime
) -> list[dict[str, Any]]:
    """The pairs with labels in PKU-SafeRLHF's columns; null is what nobody decided.

    Args:
        folder: where tasks for people go and their export is looked for, and an endpoint's replies are kept.

    Raises:
        Waiting: people have not labelled them yet.
        UserError: labels that cannot be read, or a program that fails.
    """
    if config.kind == "people":
        rows = runtime.on_main(lambda: _by_people(pairs, folder, config.least_labelled))
        runtime.print(f"{folder}: people labelled {len(rows)} of {len(pairs)} pairs")
        return rows
    if config.kind == "program":
        return runtime.on_main(lambda: _by_program(config, pairs, seed))
    judge = make_judge(config.judge, folder, runtime)
    both = list(zip(as_answers(pairs, 0), as_answers(pairs, 1), strict=True))
    judgements = judge.judge([answer for pair in both for answer in pair])
    preferences = judge.compare(both)
    return [
        {
            **pair,
            "better_response_id": _winner(preference.helpful),
            "safer_response_id": _winner(preference.harmless),
            "is_response_0_safe": None if first.harmful is None else not first.harmful,
            "is_response_1_safe": None if second.harmful is None else not second.harmful,
        }
        for pair, preference, first, second in zip(
            pairs, preferences, judgements[::2], judgements[1::2], strict=True
        )
    ]


def _winner(first_wins: float | None) -> int | str | None:
    """The id of the preferred answer, or "tie"; None for no verdict."""
    return {1.0: 0, 0.0: 1, 0.5: "tie"}.get(first_wins)


def _by_people(pairs: Sequence[dict[str, Any]], folder: Path, least: float) -> list[dict[str, Any]]:
    exports = sorted(folder.glob("export*.json"))
    tasks = write_tasks(folder, pairs)
    if not exports:
        raise Waiting(
            f"{folder}: waiting for people. Import tasks.json and labels.xml into Label Studio, have the {tasks} tasks "
            f"labelled, save the JSON export as {folder / 'export.json'}, and start this again"
        )
    rows = read_annotations(exports)
    ours = {task_of(pair) for pair in pairs}
    if foreign := sum(task_of(row) not in ours for row in rows):
        raise UserError(f"{folder}: expected labels of this round's pairs, found {foreign} of {len(rows)} others")
    if len({task_of(row) for row in rows}) < least * tasks:
        raise Waiting(
            f"{folder}: waiting for people. {len(rows)} of {tasks} tasks are labelled, and annotator.least_labelled is "
            f"{least:g}; save a fuller JSON export as {folder / 'export.json'}, and start this again"
        )
    return rows


def _by_program(config: AnnotatorConfig, pairs: Sequence[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    program = Program(config.program.path, "annotator.program.path")
    rows = program.guard(lambda: list(program.named(pairs, seed, **config.program.arguments)), rows=len(pairs))
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{program.place}: expected a list of rows, each a dict; found something else")
    return rows
