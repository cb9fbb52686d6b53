#!/usr/bin/env python3
"""Have people label pairs of answers in Label Studio.

    python tools/annotate.py export FILE [FILE ...] --out FOLDER
    python tools/annotate.py import EXPORT.json [EXPORT.json ...] --out FOLDER

`export` writes FOLDER/tasks.json and FOLDER/labels.xml for a Label Studio project. FILE is one or more files of
comparisons of our own form (labelled or not), or one answers.jsonl of `megatron-safe generate` with several samples of
each prompt (the first and the second make a pair, the third and the fourth, ...), or two, whose answers to the same
prompts make the pairs.

`import` reads what Label Studio exports as JSON, and writes FOLDER/comparisons.jsonl, to train on or to judge by, and
FOLDER/report.json: agreement, annotators, conflicts. docs/annotation/README.md has the rules.

Files appear whole or not at all. No text of an answer is printed.
"""

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_safe.annotation import import_annotations, write_tasks
from megatron_safe.data.files import write_lines
from megatron_safe.data.rows import read_rows
from megatron_safe.data.sources import plain_context
from megatron_safe.errors import UserError
from megatron_safe.evaluation.answers import Answer
from megatron_safe.evaluation.stages import read_answers
from megatron_safe.rounds.pairs import pair_rows

SHORT = {"better_response_id": "helpful", "safer_response_id": "harmless", "is_response_safe": "safe"}

# Export.


def export(options: argparse.Namespace) -> None:
    if (options.out / "tasks.json").exists():
        raise UserError(f"--out {options.out}: holds tasks.json already; choose another folder")
    first = next(read_rows(options.files))
    if "response_0" in first.fields:
        pairs, alone = comparisons(options.files), 0
    elif "response" in first.fields:
        if len(options.files) > 2:
            raise UserError(f"expected one or two files of answers, found {len(options.files)}")
        given = [read_answers([file]) for file in options.files]
        one, other = halves(*given)
        pairs, alone = pair_rows(one, other), sum(map(len, given)) - len(one) - len(other)
        if not pairs:
            raise UserError(
                f"{' and '.join(options.files)}: expected two answers to one prompt, found none among {alone}; one "
                "file needs data.samples_per_prompt 2, two files the same prompts"
            )
    else:
        found = f"fields {', '.join(first.fields)}"[:80]
        raise UserError(f"{first.place}: expected 'response_0' (a comparison) or 'response' (an answer), found {found}")
    count = write_tasks(options.out, pairs)
    for number, what in ((alone, "answers without a partner"), (len(pairs) - count, "pairs that came before")):
        if number:
            print(f"{number} {what}, left out")
    print(f"{count} tasks -> {options.out / 'tasks.json'}, {options.out / 'labels.xml'}")


def comparisons(files: Sequence[str]) -> list[dict[str, Any]]:
    """The rows as they are, with `prompt` and `history` in place of `messages`."""
    pairs = []
    for row in read_rows(files):
        history, prompt = plain_context(row)
        for which in (0, 1):
            row.text(f"response_{which}", may_be_empty=True)
        others = {name: value for name, value in row.fields.items() if name != "messages"}
        pairs.append(others | {"prompt": prompt, "history": [list(exchange) for exchange in history]})
    return pairs


def halves(answers: Sequence[Answer], others: Sequence[Answer] | None = None) -> tuple[list[Answer], list[Answer]]:
    """The first and the second answers of all pairs: of two policies, or without `others` of one."""

    def by_prompt(given: Sequence[Answer]) -> dict[tuple, list[Answer]]:
        groups: dict[tuple, list[Answer]] = {}
        for answer in given:
            groups.setdefault((answer.history, answer.prompt), []).append(answer)
        return groups

    groups = by_prompt(answers)
    against = None if others is None else by_prompt(others)
    pairs = [
        pair
        for asked, group in groups.items()
        for pair in (
            zip(group[::2], group[1::2], strict=False)
            if against is None
            else zip(group, against.get(asked, []), strict=False)
        )
    ]
    return [one for one, _ in pairs], [other for _, other in pairs]


# Import.


def import_(options: argparse.Namespace) -> None:
    rows, report = import_annotations(options.files, options.names)
    if not rows:
        raise UserError(f"{', '.join(options.files)}: expected annotations, found none in {report['tasks']} tasks")
    # Both are ready before the first is written.
    lines, summary = [json.dumps(row, ensure_ascii=False) for row in rows], json.dumps(report, indent=1)
    write_lines(options.out / "comparisons.jsonl", lines)
    write_lines(options.out / "report.json", [summary])
    print(table(report))
    print(f"{len(rows)} comparisons -> {options.out / 'comparisons.jsonl'}, {options.out / 'report.json'}")


def table(report: dict[str, Any]) -> str:
    """What people agree on, and how each does, in lines."""
    harms = [name for name, one in report["agreement"].items() if name not in SHORT and one["alpha"] is not None]
    texts = [
        f"{report['tasks']} tasks, {report['tasks_without_annotation']} of them without an annotation; "
        f"{report['annotations']} annotations count, {report['superseded']} superseded, {report['skipped']} skipped",
        "",
        f"{'question':<52} {'alpha':>6} {'equal':>6} {'units':>6}   labels",
    ]
    for name in (*SHORT, *harms):
        one, labels = report["agreement"][name], report["labels"]
        if name in SHORT:
            counts = ", ".join(f"{value} {count}" for value, count in labels[name].items())
        else:
            counts = str(labels["harms"].get(name.removeprefix("harm: "), 0))
        texts.append(f"{name:<52} {number(one['alpha'])} {number(one['equal'])} {one['units']:>6}   {counts}")
    texts += ["", f"{'annotator':<24} {'done':>5} {'skipped':>7} {'seconds':>7}   equal to the others' majority"]
    for name, one in report["annotators"].items():
        seconds = "-" if one["median_seconds"] is None else f"{one['median_seconds']:.0f}"
        shares = ", ".join(
            f"{SHORT[question]} {number(share['share']).strip()} of {share['compared']}"
            for question, share in one["with_the_others"].items()
        )
        texts.append(f"{name:<24} {one['annotations']:>5} {one['skipped']:>7} {seconds:>7}   {shares}")
    texts += [
        "",
        f"{len(report['conflicts'])} labels undecided by even votes, {len(report['contradictions'])} contradictions, "
        f"{report['unsafe_without_harms']} unsafe answers without a kind of harm",
    ]
    return "\n".join(texts)


def number(value: float | None) -> str:
    return f"{'-':>6}" if value is None else f"{value:6.3f}"


# The command line.


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    out = commands.add_parser("export", help="tasks.json and labels.xml for Label Studio")
    out.add_argument("files", nargs="+", metavar="FILE", help="comparisons, or one or two files of answers")
    out.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to make them in")
    out.set_defaults(run=export)
    back = commands.add_parser("import", help="comparisons.jsonl and report.json out of Label Studio's exports")
    back.add_argument("files", nargs="+", metavar="EXPORT.json", help="exports as JSON, taken together")
    back.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to make them in")
    back.add_argument("--names", action="store_true", help="name annotators as the exports do (default: by number)")
    back.set_defaults(run=import_)
    return parser.parse_args(arguments)


def _terminate(signum, frame) -> None:
    raise SystemExit(128 + signum)  # unwinds, so that what was begun is removed


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 after one line about what the user gave, or 130 where they interrupted."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        options.run(options)
    except UserError as error:
        print(f"annotate: error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("annotate: interrupted", file=sys.stderr, flush=True)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
