"""Label Studio's JSON exports: who said what about which pair."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_safe.annotation.page import CHOICES
from megatron_safe.annotation.tasks import SIDES, order, shown
from megatron_safe.data.rows import Row, describe, read_rows

Order = Literal[0, 1, "tie"]


@dataclass(frozen=True, slots=True)
class Annotation:
    """What one person said of one pair, by the responses' own numbers. None: not answered.

    safe, harms: of response 0 and 1; harms are names, empty where none were chosen.
    better, safer: the more helpful and the more harmless response.
    seconds: how long it took, where the export says.
    """

    task: str
    annotator: str
    safe: tuple[bool | None, bool | None]
    harms: tuple[tuple[str, ...], tuple[str, ...]]
    better: Order | None
    safer: Order | None
    seconds: float | None


@dataclass
class Exports:
    """rows: task id -> its pair, in the order of the files. annotations: at most one by a person of a task.

    skipped: by annotator, how many tasks. superseded: how many annotations by somebody who annotated the task again
    later; one that is in two files is one of them.
    """

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    annotations: list[Annotation] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    superseded: int = 0


def read_exports(files: Sequence[str | Path]) -> Exports:
    """The files together, as if they were one: a task may be in several of them.

    Raises UserError (file, task, field) for what is no JSON export of tasks that `write_tasks` wrote.
    """
    exports = Exports()
    newest: dict[tuple[str, str], tuple[str, Annotation | None]] = {}  # (task, annotator) -> when, what; None: skipped
    for row in read_rows(files):
        row = Row(f"{row.place} (task {row.fields.get('id')})", row.fields)
        task, pair = _pair(row)
        exports.rows.setdefault(task, pair)
        annotations = row.get("annotations", "a list of annotations (Label Studio's export as JSON, not JSON-MIN)")
        if not isinstance(annotations, list):
            raise row.wrong("annotations", "a list of annotations", describe(annotations))
        for at, given in enumerate(annotations):
            where = f"annotations[{at}]"
            if not isinstance(given, dict):
                raise row.wrong(where, "an object", describe(given))
            annotator = _annotator(row, where, given)
            when = str(given.get("updated_at") or given.get("created_at") or "")
            annotation = None if given.get("was_cancelled") else _annotation(row, where, given, task, annotator)
            key = task, annotator
            exports.superseded += key in newest
            if key not in newest or newest[key][0] <= when:
                newest[key] = when, annotation
    for (_, annotator), (_, annotation) in newest.items():
        if annotation is None:
            exports.skipped[annotator] += 1
        else:
            exports.annotations.append(annotation)
    return exports


def _pair(row: Row) -> tuple[str, dict[str, Any]]:
    """The id and the pair of a task, after making sure that people saw this very pair."""
    data = row.get("data", "an object")
    if not isinstance(data, dict) or not isinstance(data.get("row"), dict):
        raise row.wrong("data", "an object with id, dialogue, first, second and row", describe(data))
    pair = Row(row.place, data["row"])
    pair.text("prompt")
    for name in ("response_0", "response_1"):
        pair.text(name, may_be_empty=True)
    pair.history()
    expected = shown(data["row"])
    for name, value in expected.items():
        if data.get(name) != value:
            found = f"another ({describe(data.get(name))})"
            raise row.wrong(f"data.{name}", "what was exported for the texts of its row", found)
    return expected["id"], data["row"]


def _annotator(row: Row, where: str, given: dict[str, Any]) -> str:
    """By e-mail address where the export has it, which is the same person in every Label Studio, else by number."""
    person = given.get("completed_by")
    if isinstance(person, dict):
        person = person.get("email") or person.get("id")
    if isinstance(person, bool) or not isinstance(person, (int, str)) or person == "":
        raise row.wrong(f"{where}.completed_by", "a user", describe(person))
    return str(person)


def _annotation(row: Row, where: str, given: dict[str, Any], task: str, annotator: str) -> Annotation:
    chosen = _chosen(row, f"{where}.result", given.get("result"))
    sides = dict(zip(SIDES, order(task), strict=True))
    safe: list[bool | None] = [None, None]
    harms: list[tuple[str, ...]] = [(), ()]
    for side, which in sides.items():
        if verdict := chosen.get(f"{side}_safety"):
            safe[which] = verdict == ("safe",)
        harms[which] = chosen.get(f"{side}_harms", ())
    orders: dict[str, Any] = sides | {"tie": "tie"}
    better, safer = (orders[chosen[name][0]] if name in chosen else None for name in ("helpful", "harmless"))
    seconds = given.get("lead_time")
    if seconds is not None and (isinstance(seconds, bool) or not isinstance(seconds, (int, float))):
        raise row.wrong(f"{where}.lead_time", "a number of seconds", describe(seconds))
    return Annotation(task, annotator, (safe[0], safe[1]), (harms[0], harms[1]), better, safer, seconds)


def _chosen(row: Row, where: str, result: Any) -> dict[str, tuple[str, ...]]:
    """Name of a control -> its choices. Controls that a project added to the page are left aside."""
    if not isinstance(result, list) or not all(isinstance(item, dict) for item in result):
        raise row.wrong(where, "a list of objects", describe(result))
    chosen: dict[str, tuple[str, ...]] = {}
    for at, item in enumerate(result):
        name = item.get("from_name")
        if name not in CHOICES:
            continue
        place, value = f"{where}[{at}] ({name})", item.get("value")
        choices = value.get("choices") if isinstance(value, dict) else None
        if not isinstance(choices, list) or not choices:
            raise row.wrong(place, "at least one choice", describe(choices))
        for choice in choices:
            if choice not in CHOICES[name]:
                raise row.wrong(place, "choices of labels.xml", describe(choice))
        if name in chosen or (len(choices) > 1 and not name.endswith("_harms")):
            raise row.wrong(place, "one choice", f"{len(choices) + len(chosen.get(name, ()))}")
        chosen[name] = tuple(choices)
    return chosen
