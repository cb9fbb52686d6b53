"""Pairs of answers to label, and the labelled ones as files to train on."""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_safe.data.records import Prompt
from megatron_safe.data.sampler import ShuffledStream
from megatron_safe.evaluation.answers import Answer


def draw(prompts: Sequence[Prompt], pairs: int, seed: int) -> list[Prompt]:
    """`pairs` prompts, each as often as any other or once more; all of them, in order, where `pairs` is 0."""
    if pairs == 0:
        return list(prompts)
    return [prompts[i] for i in ShuffledStream(len(prompts), pairs, seed).indices(0)]


def pair_rows(first: Sequence[Answer], second: Sequence[Answer]) -> list[dict[str, Any]]:
    """Unlabelled comparisons in our JSONL form; entry i of both answers the same prompt."""
    return [
        {
            "prompt": one.prompt,
            "history": [list(exchange) for exchange in one.history],
            "response_0": one.response,
            "response_1": other.response,
            "response_0_ended": one.ended,
            "response_1_ended": other.ended,
            "red_team": one.red_team,
            "category": one.category,
        }
        for one, other in zip(first, second, strict=True)
    ]


def split(rows: Sequence[dict], held_out: float) -> tuple[list[dict], list[dict]]:
    """(to learn from, held out), both in order. Rows of one prompt stay together; the prompts that come first are held
    out, until their rows are the share `held_out` of all or just more."""
    count = Counter(_asked(row) for row in rows)
    held: set[str] = set()
    for row in rows:
        if sum(count[asked] for asked in held) >= held_out * len(rows):
            break
        held.add(_asked(row))
    return [row for row in rows if _asked(row) not in held], [row for row in rows if _asked(row) in held]


def _asked(row: dict) -> str:
    return json.dumps([row.get("history") or [], row["prompt"]])


def read_json_lines(path: Path) -> list[dict]:
    # Lines end with \n alone: answers may hold what else `splitlines` takes for an end.
    with path.open(encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file]


def as_answers(rows: Sequence[dict], which: int) -> list[Answer]:
    """The first (0) or second (1) answers of unlabelled comparisons."""
    fields = {field.name for field in dataclasses.fields(Answer)}
    return [
        Answer(
            response=row[f"response_{which}"],
            ended=row[f"response_{which}_ended"],
            history=tuple((user, assistant) for user, assistant in row["history"]),
            **{name: row[name] for name in fields & {"prompt", "red_team", "category"}},
        )
        for row in rows
    ]
