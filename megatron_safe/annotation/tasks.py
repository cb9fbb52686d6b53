"""Label Studio's tasks out of pairs of answers."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_safe.annotation.page import labelling_page
from megatron_safe.data.files import write_lines

SIDES = ("first", "second")
"""The answers as people see them: which response is first is drawn for each task."""
_EMPTY = "(nothing: the text is empty)"  # a page with nothing on it looks broken


def write_tasks(folder: Path, pairs: Iterable[Mapping[str, Any]]) -> int:
    """Write FOLDER/tasks.json and FOLDER/labels.xml, what a Label Studio project is made of.

    A task shows the dialogue and the two answers, in an order drawn by a hash of the texts, so that neither the place
    nor the source of an answer tells anything. It keeps the whole pair, which `read_annotations` gives back.

    Args:
        pairs: comparisons of our own form; `prompt`, `response_0` and `response_1` are texts, `history` pairs of texts
            or missing, further fields whatever JSON can hold.

    Returns:
        The number of tasks. Pairs with the same texts are one task.

    Raises:
        UserError: a file cannot be written.
    """
    tasks = {}
    for pair in pairs:
        task = {"data": shown(pair) | {"row": dict(pair)}}
        tasks.setdefault(task["data"]["id"], task)
    write_lines(folder / "labels.xml", [labelling_page()])
    lines = [json.dumps(task) for task in tasks.values()]
    # tasks.json comes last: who finds it finds both.
    write_lines(folder / "tasks.json", ["[", *(f"{line}," for line in lines[:-1]), *lines[-1:], "]"])
    return len(tasks)


def shown(pair: Mapping[str, Any]) -> dict[str, Any]:
    """What a task's page shows of a pair, and the task's id."""
    task = task_of(pair)
    responses = pair["response_0"], pair["response_1"]
    turns = [text for exchange in pair.get("history") or () for text in exchange] + [pair["prompt"]]
    speakers = ("User", "Assistant")
    return {
        "id": task,
        "dialogue": [{"speaker": speakers[i % 2], "text": text or _EMPTY} for i, text in enumerate(turns)],
        **{side: responses[which] or _EMPTY for side, which in zip(SIDES, order(task), strict=True)},
    }


def task_of(pair: Mapping[str, Any]) -> str:
    """The id of a pair's task: 16 hexadecimal digits by a hash of its texts."""
    texts = json.dumps([pair.get("history") or [], pair["prompt"], pair["response_0"], pair["response_1"]])
    return hashlib.sha256(texts.encode()).hexdigest()[:16]


def order(task: str) -> tuple[int, int]:
    """Which responses are shown first and second."""
    return (1, 0) if int(task, 16) % 2 else (0, 1)
