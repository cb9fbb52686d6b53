"""The published forms of data sets, as records: `SOURCES` says which there are and what each can give.

`better_response_id` and `safer_response_id` answer different questions. A source that asked one of them gives that one;
the other is None, never a copy.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_safe.data.dialogues import answered, asked, turns_of_messages, turns_of_transcript
from megatron_safe.data.records import Comparison, Demonstration, History, Prompt
from megatron_safe.data.rows import BadRow, BadRows, Row, describe, read_rows

Kind = Literal["demonstrations", "comparisons", "prompts"]
Question = Literal["helpfulness", "harmlessness"]
QUESTIONS: tuple[Question, ...] = get_args(Question)
ORDERS = "better_response_id", "safer_response_id"
"""The columns that answer the two questions about a pair."""


@dataclass
class Reading:
    """What a source needs besides its rows, and what it has to say afterwards.

    bad_rows: what to do with rows that are not as described.
    question: what the annotators of hh-rlhf were asked.
    left_out: how many good rows gave no record, by why.
    ties: of each label that orders two answers, how many rows call them equal: their records have None there.
    """

    bad_rows: BadRows = field(default_factory=BadRows)
    question: Question | None = None
    left_out: Counter[str] = field(default_factory=Counter)
    ties: Counter[str] = field(default_factory=Counter)


Reader = Callable[[Iterable[Row], Reading], Iterator[Any]]


def _each(convert: Callable[[Row, Reading], Iterable[Any]]) -> Reader:
    """A reader out of what makes records of one row."""

    def read(rows: Iterable[Row], reading: Reading) -> Iterator[Any]:
        for row in rows:
            try:
                records = list(convert(row, reading))
            except BadRow as error:
                reading.bad_rows.add(error)
            else:
                yield from records

    return read


def _distinct(convert: Callable[[Row, Reading], Iterable[Prompt]]) -> Reader:
    """As `_each`, for data sets that have a row for each answer: a prompt that came before is left out."""

    def read(rows: Iterable[Row], reading: Reading) -> Iterator[Prompt]:
        seen = set()
        for prompt in _each(convert)(rows, reading):
            if (prompt.history, prompt.prompt) in seen:
                reading.left_out["prompts that came before"] += 1
            else:
                seen.add((prompt.history, prompt.prompt))
                yield prompt

    return read


# Our own form.


def plain_context(row: Row) -> tuple[History, str]:
    """History and prompt of a row of our own form, out of `messages` where it has them."""
    if not row.has("messages"):
        return row.history(), row.text("prompt")
    _check_messages_alone(row, "prompt", "history")
    return asked(row, "messages", turns_of_messages(row))


def _check_messages_alone(row: Row, *others: str) -> None:
    for name in others:
        if row.has(name):
            raise row.wrong(name, "no such field beside 'messages'", describe(row.fields[name]))


def _plain_demonstration(row: Row, reading: Reading) -> Iterator[Demonstration]:
    if row.has("messages"):
        _check_messages_alone(row, "prompt", "history", "response")
        history, prompt, response = answered(row, "messages", turns_of_messages(row))
        yield Demonstration(prompt, row.check_text("messages", response), history)
    else:
        yield Demonstration(row.text("prompt"), row.text("response"), row.history())


def _plain_prompt(row: Row, reading: Reading) -> Iterator[Prompt]:
    history, prompt = plain_context(row)
    yield Prompt(
        prompt=prompt,
        red_team=row.flag("red_team") if "red_team" in row.fields else False,
        category=row.text("category") if row.has("category") else None,
        history=history,
        origin=row.text("origin") if row.has("origin") else None,
    )


def _comparison(row: Row, context: tuple[History, str], asked_all: bool) -> Comparison:
    """PKU-SafeRLHF's columns; a label may be missing or null unless `asked_all`."""

    def label(read: Callable[[str], Any], name: str) -> Any:
        return read(name) if asked_all or row.has(name) else None

    def categories(name: str) -> tuple[str, ...]:
        return row.names(name) if row.has(name) else ()

    history, prompt = context
    return Comparison(
        prompt=prompt,
        response_0=row.text("response_0", may_be_empty=True),
        response_1=row.text("response_1", may_be_empty=True),
        better_response_id=label(row.response_id, "better_response_id"),
        safer_response_id=label(row.response_id, "safer_response_id"),
        is_response_0_safe=label(row.flag, "is_response_0_safe"),
        is_response_1_safe=label(row.flag, "is_response_1_safe"),
        response_0_categories=categories("response_0_harm_category"),
        response_1_categories=categories("response_1_harm_category"),
        history=history,
    )


def _plain_comparison(row: Row, reading: Reading) -> Iterator[Comparison]:
    """A tie on a question orders nothing, so it gives no label; `reading.ties` counts it."""
    tied = [name for name in ORDERS if row.has(name) and row.response_id(name, ties=True) == "tie"]
    untied = Row(row.place, row.fields | dict.fromkeys(tied)) if tied else row
    comparison = _comparison(untied, plain_context(row), asked_all=False)
    reading.ties.update(tied)
    yield comparison


def plain_row(record: Demonstration | Comparison | Prompt) -> dict[str, Any]:
    """The row of our own form that is read as this record; fields that say nothing are left out."""
    row: dict[str, Any] = {"history": [list(exchange) for exchange in record.history]} if record.history else {}
    row["prompt"] = record.prompt
    if isinstance(record, Demonstration):
        return row | {"response": record.response}
    if isinstance(record, Prompt):
        row |= {"red_team": record.red_team, "category": record.category, "origin": record.origin}
    else:
        row |= {"response_0": record.response_0, "response_1": record.response_1}
        for name in ("better_response_id", "safer_response_id", "is_response_0_safe", "is_response_1_safe"):
            row[name] = getattr(record, name)
        for side in (0, 1):
            harms = getattr(record, f"response_{side}_categories")
            row[f"response_{side}_harm_category"] = {name: True for name in harms} or None
    return {name: value for name, value in row.items() if value is not None}


# PKU-SafeRLHF, and the pairs out of it that lost their columns.


def _pku_comparison(row: Row, reading: Reading) -> Iterator[Comparison]:
    yield _comparison(row, ((), row.text("prompt")), asked_all=True)


def _harmful_prompt(row: Row, reading: Reading) -> Iterator[Prompt]:
    """Of data sets whose prompts were collected to provoke harm."""
    yield Prompt(row.text("prompt"), red_team=True)


def _safer_and_unsafer(
    prompt: str, safe: str, unsafe: str, harms_of_safe: tuple[str, ...] = (), harms_of_unsafe: tuple[str, ...] = ()
) -> Comparison:
    """A safe answer with an unsafe one."""
    safer = _drawn_id(prompt, safe, unsafe)
    answers = [(safe, harms_of_safe), (unsafe, harms_of_unsafe)]
    (response_0, harms_0), (response_1, harms_1) = answers if safer == 0 else answers[::-1]
    return Comparison(prompt, response_0, response_1, None, safer, safer == 0, safer == 1, harms_0, harms_1)


def _drawn_id(*texts: str) -> int:
    """0 or 1 by a hash of a pair's texts: where the better answer comes, which must not tell a model that it is."""
    return hashlib.sha256("\0".join(texts).encode()).digest()[0] % 2


def _safe_unsafe_pair(row: Row, reading: Reading) -> Iterator[Comparison]:
    yield _safer_and_unsafer(
        row.text("prompt"), row.text("safe_response", may_be_empty=True), row.text("unsafe_response", may_be_empty=True)
    )


# BeaverTails.


def _beavertails_comparisons(rows: Iterable[Row], reading: Reading) -> Iterator[Comparison]:
    """Pairs of a safe and an unsafe answer to the same prompt, each answer in one pair at most, in their order.

    An answer that was annotated more than once counts once, and not at all where its annotators disagree on whether it
    is safe.
    """
    found: dict[str, dict[str, tuple[set[bool], list[str]]]] = {}  # prompt -> response -> verdicts, harms

    def note(row: Row, _: Reading) -> Iterator[None]:
        prompt, response = row.text("prompt"), row.text("response", may_be_empty=True)
        is_safe, harms = row.flag("is_safe"), row.names("category")
        answers = found.setdefault(prompt, {})
        reading.left_out["rows about an answer that came before"] += response in answers
        verdicts, known = answers.setdefault(response, (set(), []))
        verdicts.add(is_safe)
        known += [harm for harm in harms if harm not in known]
        return iter(())

    for _ in _each(note)(rows, reading):
        pass
    for prompt, answers in found.items():
        sides: dict[bool, list[tuple[str, tuple[str, ...]]]] = {True: [], False: []}
        for response, (verdicts, harms) in answers.items():
            if len(verdicts) == 1:
                sides[next(iter(verdicts))].append((response, tuple(harms)))
            else:
                reading.left_out["answers whose annotators disagree"] += 1
        pairs = min(len(sides[True]), len(sides[False]))
        reading.left_out["answers that make no pair"] += len(sides[True]) + len(sides[False]) - 2 * pairs
        for (safe, harms_of_safe), (unsafe, harms_of_unsafe) in zip(sides[True], sides[False], strict=False):
            yield _safer_and_unsafer(prompt, safe, unsafe, harms_of_safe, harms_of_unsafe)


# Anthropic's hh-rlhf.


def question_of(path: str) -> Question | None:
    """What the annotators of a part of hh-rlhf were asked, by the last name on its path that tells, if any does."""
    for name in reversed(Path(path).parts):
        told = [question for word, question in zip(("helpful", "harmless"), QUESTIONS, strict=True) if word in name]
        if len(told) == 1:
            return told[0]
    return None


def _hh_comparison(row: Row, reading: Reading) -> Iterator[Comparison]:
    """`chosen` answers the question that was asked; nobody asked the other, nor what is safe by itself."""
    chosen, rejected = turns_of_transcript(row, "chosen"), turns_of_transcript(row, "rejected")
    history, prompt, response_0 = answered(row, "chosen", chosen)
    *context, response_1 = answered(row, "rejected", rejected)
    if context != [history, prompt]:
        same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), 0)
        found = f"{same} of {len(chosen) - 1} turns in common"
        raise row.wrong("rejected", "the turns of 'chosen' up to the last", found)
    chosen_id = _drawn_id(prompt, response_0, response_1)
    if chosen_id == 1:
        response_0, response_1 = response_1, response_0
    better, safer = (chosen_id, None) if reading.question == "helpfulness" else (None, chosen_id)
    yield Comparison(prompt, response_0, response_1, better, safer, None, None, history=history)


def _hh_demonstration(row: Row, reading: Reading) -> Iterator[Demonstration]:
    history, prompt, response = answered(row, "chosen", turns_of_transcript(row, "chosen"))
    if not response:
        raise row.wrong("chosen", "a last turn that is not empty", "an empty one")
    yield Demonstration(prompt, response, history)


def _hh_prompt(row: Row, reading: Reading) -> Iterator[Prompt]:
    history, prompt, _ = answered(row, "chosen", turns_of_transcript(row, "chosen"))
    yield Prompt(prompt, red_team=reading.question == "harmlessness", history=history)


def _red_team_attempt(row: Row, reading: Reading) -> Iterator[Prompt]:
    """The attack's first turn; the first of its tags is its category."""
    tags = row.fields.get("tags") or []
    if not isinstance(tags, list):
        raise row.wrong("tags", "a list of strings", describe(tags))
    category = row.check_text("tags", tags[0]) if tags else None
    _, prompt = turns_of_transcript(row, "transcript")[0]
    yield Prompt(prompt, red_team=True, category=category)


# Stanford's Alpaca.


def _alpaca_rows(row: Row) -> list[tuple[str, Row]]:
    """(prompt, row with `output`) of each instance: one, or as many as a seed task has."""
    instruction = row.text("instruction")
    instances = [row]
    if row.has("instances"):
        values = row.fields["instances"]
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            raise row.wrong("instances", "a list of objects with input and output", describe(values))
        instances = [Row(row.place, value) for value in values]
    prompts = []
    for instance in instances:
        given = instance.text("input", may_be_empty=True) if instance.has("input") else ""
        # With a space between, as Safe RLHF's authors join them.
        prompts.append(f"{instruction} {given}" if given else instruction)
    return list(zip(prompts, instances, strict=True))


def _alpaca_demonstrations(row: Row, reading: Reading) -> Iterator[Demonstration]:
    for prompt, instance in _alpaca_rows(row):
        yield Demonstration(prompt, instance.text("output"))


def _alpaca_prompts(row: Row, reading: Reading) -> Iterator[Prompt]:
    for prompt, _ in _alpaca_rows(row):
        yield Prompt(prompt)


SOURCES: dict[str, dict[Kind, Reader]] = {
    "plain": {
        "demonstrations": _each(_plain_demonstration),
        "comparisons": _each(_plain_comparison),
        "prompts": _each(_plain_prompt),
    },
    "pku-saferlhf": {"comparisons": _each(_pku_comparison), "prompts": _distinct(_harmful_prompt)},
    "beavertails": {"comparisons": _beavertails_comparisons, "prompts": _distinct(_harmful_prompt)},
    "hh-rlhf": {
        "demonstrations": _each(_hh_demonstration),
        "comparisons": _each(_hh_comparison),
        "prompts": _distinct(_hh_prompt),
    },
    "hh-red-team": {"prompts": _distinct(_red_team_attempt)},
    "alpaca": {"demonstrations": _each(_alpaca_demonstrations), "prompts": _distinct(_alpaca_prompts)},
    "safe-unsafe-pairs": {"comparisons": _each(_safe_unsafe_pair), "prompts": _distinct(_harmful_prompt)},
}
"""Name of a published form -> what it can give, and how it is read."""


# Files of our own form, where there is no config: every bad row is refused.


def read_demonstrations(paths: Sequence[str | Path]) -> list[Demonstration]:
    """Rows with ``prompt`` and ``response`` (both non-empty strings), or ``messages``; other columns are ignored.

    Raises UserError for a file that cannot be read or has no rows, and for the first row that is not as described.
    """
    return list(SOURCES["plain"]["demonstrations"](read_rows(paths), Reading()))


def read_comparisons(paths: Sequence[str | Path]) -> list[Comparison]:
    """Rows in PKU-SafeRLHF's published columns; those that `Comparison` does not name are ignored.

    ``prompt`` must be non-empty, ``response_0`` and ``response_1`` may be empty (a policy may answer nothing),
    ``better_response_id`` and ``safer_response_id`` are 0, 1 or "tie" (None in the record), ``is_response_0_safe`` and
    ``is_response_1_safe`` bools, each of the four also null or missing. UserError as in `read_demonstrations`.
    """
    return list(SOURCES["plain"]["comparisons"](read_rows(paths), Reading()))


def read_prompts(paths: Sequence[str | Path]) -> list[Prompt]:
    """Rows with ``prompt`` or ``messages``, and optionally ``red_team`` (bool), ``category`` and ``origin`` (strings or
    null). UserError as in `read_demonstrations`."""
    return list(SOURCES["plain"]["prompts"](read_rows(paths), Reading()))
