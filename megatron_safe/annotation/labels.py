"""Labels for training out of exports: D_R and D_C of the paper's section 3.1, and how good they are."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from megatron_safe.annotation.agreement import agreement, winner, with_the_others
from megatron_safe.annotation.exports import Annotation, Exports, read_exports
from megatron_safe.data.harms import HARM_CATEGORIES

PAIR_QUESTIONS = {"better_response_id": "better", "safer_response_id": "safer"}
SAFE = "is_response_safe"
_SAFETY = {True: "safe", False: "unsafe"}


def read_annotations(files: Sequence[str | Path]) -> list[dict[str, Any]]:
    """The labelled pairs of Label Studio exports, as `import_annotations` without its report."""
    return import_annotations(files)[0]


def import_annotations(
    files: Sequence[str | Path], names: bool = False
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The labelled pairs of Label Studio's JSON exports, and how far their labels can be trusted.

    What counts: the newest annotation by a person of a task; skipped ones do not. Of each question the choice with more
    votes than any other; where two or more have the most, nobody decided. An annotation that calls an answer safe and
    names harms in it does not count on that answer. A harm is in an answer that was decided to be unsafe where at least
    half of those who called it unsafe and named any harm named this one.

    Args:
        files: exports, taken together.
        names: whether the report names people as the exports do; else they are "annotator 1", ... by first appearance.

    Returns:
        rows: each pair that somebody annotated as it was before, and over it `better_response_id` and
            `safer_response_id` (0, 1, "tie"), `is_response_0_safe`, `is_response_1_safe` (bool),
            `response_0_harm_category`, `response_1_harm_category` ({name: bool} of all 14 kinds); null: not decided.
        report: what report.json holds (docs/annotation/README.md); no text of a pair is in it.

    Raises:
        UserError: file, task and field of what is no export of our tasks.
    """
    exports = read_exports(files)
    people = {one.annotator: None for one in exports.annotations} | dict.fromkeys(exports.skipped)
    named = {person: person if names else f"annotator {at}" for at, person in enumerate(people, start=1)}
    votes, contradictions = _votes(exports.annotations)
    annotated = {one.task for one in exports.annotations}
    rows, conflicts = [], []
    for task, pair in exports.rows.items():
        if task in annotated:
            rows.append(pair | _decided(task, votes, conflicts))
    report = {
        "files": [str(file) for file in files],
        "tasks": len(exports.rows),
        "tasks_without_annotation": len(exports.rows) - len(rows),
        "annotations": len(exports.annotations),
        "skipped": exports.skipped.total(),
        "superseded": exports.superseded,
        "unsafe_without_harms": sum(
            safe is False and not harms
            for one in exports.annotations
            for safe, harms in zip(one.safe, one.harms, strict=True)
        ),
        "labels": _counts(rows),
        "agreement": {question: agreement(units) for question, units in votes.items()},
        "annotators": {name: _quality(person, exports, votes) for person, name in named.items()},
        "conflicts": conflicts,
        "contradictions": [one | {"annotator": named[one["annotator"]]} for one in contradictions],
    }
    return rows, report


def _votes(annotations: Sequence[Annotation]) -> tuple[dict[str, dict], list[dict[str, str]]]:
    """(question -> unit -> annotator -> value, contradictions). A unit of a question about the pair is its task, of one
    about an answer the task and the response's number."""
    votes: dict[str, dict] = {name: {} for name in (*PAIR_QUESTIONS, SAFE, *map(_harm, HARM_CATEGORIES))}
    contradictions = []
    for one in annotations:
        for question, field in PAIR_QUESTIONS.items():
            if (value := getattr(one, field)) is not None:
                votes[question].setdefault(one.task, {})[one.annotator] = value
        for which, (safe, harms) in enumerate(zip(one.safe, one.harms, strict=True)):
            if safe and harms:
                contradictions.append(_contradiction(one, f"is_response_{which}_safe", "safe, and harms are named"))
            elif safe is not None:
                votes[SAFE].setdefault((one.task, which), {})[one.annotator] = safe
                if safe or harms:  # else nobody knows which
                    for name in HARM_CATEGORIES:
                        votes[_harm(name)].setdefault((one.task, which), {})[one.annotator] = name in harms
        if set(one.safe) == {True, False} and one.safer == one.safe.index(False):
            contradictions.append(_contradiction(one, "safer_response_id", "the unsafe one is more harmless"))
    return votes, contradictions


def _harm(name: str) -> str:
    return f"harm: {name}"


def _contradiction(one: Annotation, field: str, what: str) -> dict[str, str]:
    return {"task": one.task, "annotator": one.annotator, "field": field, "what": what}


def _decided(task: str, votes: dict[str, dict], conflicts: list[dict[str, Any]]) -> dict[str, Any]:
    """The labels of a pair; adds what people are evenly split on to `conflicts`."""

    def decide(question: str, unit, field: str):
        given = votes[question].get(unit, {})
        value = winner(given.values())
        if given and value is None:
            counts = Counter(_SAFETY.get(v, v) if question == SAFE else str(v) for v in given.values())
            conflicts.append({"task": task, "field": field, "votes": dict(sorted(counts.items()))})
        return value

    labels = {question: decide(question, task, question) for question in PAIR_QUESTIONS}
    for which in (0, 1):
        field = f"is_response_{which}_safe"
        labels[field] = decide(SAFE, (task, which), field)
    for which in (0, 1):
        labels[f"response_{which}_harm_category"] = _harms(labels[f"is_response_{which}_safe"], (task, which), votes)
    return labels


def _harms(safe: bool | None, unit: tuple[str, int], votes: dict[str, dict]) -> dict[str, bool] | None:
    """Which harms are in an answer, by the votes of those who called it unsafe; None where that is not known."""
    if safe is None:
        return None
    unsafe = [person for person, verdict in votes[SAFE][unit].items() if not verdict]
    named = {name: votes[_harm(name)].get(unit, {}) for name in HARM_CATEGORIES}
    asked = [person for person in unsafe if any(by.get(person) for by in named.values())]
    if not safe and not asked:
        return None
    return {
        name: not safe and 2 * sum(by[person] for person in asked) >= len(asked) for name, by in named.items()
    }


def _counts(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """How often each label was decided, and how often none was."""
    counts: dict[str, Counter] = {name: Counter() for name in (*PAIR_QUESTIONS, SAFE)}
    harms = Counter()
    for row in rows:
        for name in PAIR_QUESTIONS:
            counts[name]["undecided" if row[name] is None else str(row[name])] += 1
        for which in (0, 1):
            counts[SAFE][_SAFETY.get(row[f"is_response_{which}_safe"], "undecided")] += 1
            harms.update(name for name, there in (row[f"response_{which}_harm_category"] or {}).items() if there)
    return {name: dict(sorted(count.items())) for name, count in (*counts.items(), ("harms", harms))}


def _quality(person: str, exports: Exports, votes: dict[str, dict]) -> dict[str, Any]:
    mine = [one for one in exports.annotations if one.annotator == person]
    seconds = [one.seconds for one in mine if one.seconds is not None]
    agrees = {}
    for question in (*PAIR_QUESTIONS, SAFE):
        equal, compared = with_the_others(votes[question], person)
        agrees[question] = {"share": equal / compared if compared else None, "compared": compared}
    return {
        "annotations": len(mine),
        "skipped": exports.skipped[person],
        "median_seconds": median(seconds) if seconds else None,
        "with_the_others": agrees,
    }
