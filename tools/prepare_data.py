#!/usr/bin/env python3
"""Look at data sets, and make clean files of them.

    python tools/prepare_data.py inspect PATH ... [--source NAME] [--kind KIND] [--tokenizer DIR] [--against PATH]
    python tools/prepare_data.py convert PATH ... --source NAME --kind KIND --out FILE.jsonl
    python tools/prepare_data.py split PATH ... --source NAME --kind KIND --out DIR [--fraction 0.1] [--seed 0]

PATH is a file, a folder or a name on the Hugging Face hub, NAME its published form, KIND what to make of it.

`inspect` prints counts, lengths, labels, duplicates and leaks, and no text of the rows; with --out also writes them as
summary.json and summary.png. `convert` writes rows of our own form. `split` writes them as train.jsonl and test.jsonl:
a row goes where a hash of its dialogue's first user turn and the seed says, so rows that begin alike stay together, in
every file that is split with the same seed and fraction.

Files appear whole or not at all.
"""

import argparse
import hashlib
import json
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

from data_pictures import draw, table
from data_statistics import Record, count_words, leaks, measure, opening, progress

from megatron_safe.data.files import write_lines
from megatron_safe.data.mixture import read
from megatron_safe.data.sources import QUESTIONS, SOURCES, Kind, plain_row
from megatron_safe.data.tokenizer import load_tokenizer
from megatron_safe.errors import UserError


def read_entries(options: argparse.Namespace, paths: list[str], split: str | None, say=print) -> list[Record]:
    shared = {"source": options.source, "split": split, "question": options.question}
    entries = [{"path": path, **shared} for path in paths]
    mixture = read(
        options.kind, "PATH", entries, options.on_bad_row, weighted=False, say=say,
        watch=lambda rows: progress(rows, "rows"),
    )  # fmt: skip
    return mixture.records


def inspect(options: argparse.Namespace) -> None:
    notes: list[str] = []
    records = read_entries(options, options.paths, options.split, notes.append)
    lengths_of, unit = count_words, "word"
    if options.tokenizer is not None:
        tokenizer = load_tokenizer(options.tokenizer)
        lengths_of, unit = lambda texts: [len(tokens) for tokens in tokenizer.encode_batch(texts)], "token"
    found: dict[str, Any] = {"paths": options.paths, "source": options.source, "kind": options.kind}
    found |= measure(records, lengths_of, unit)
    if options.against is not None:
        others = read_entries(options, [options.against], options.against_split, notes.append)
        found["leaks"] = {"against": options.against, **leaks(records, others)}
    found["notes"] = notes
    print(table(found))
    if options.out is not None:
        try:
            options.out.mkdir(parents=True, exist_ok=True)
            draw(found, options.out / "summary.png")
        except OSError as error:
            raise UserError(f"{options.out}: cannot be written: {error}") from error
        write_lines(options.out / "summary.json", [json.dumps(found, indent=1, ensure_ascii=False)])
        print(f"-> {options.out / 'summary.json'}, {options.out / 'summary.png'}")


def convert(options: argparse.Namespace) -> None:
    records = read_entries(options, options.paths, options.split)
    write_lines(options.out, lines(records))
    print(f"{len(records)} {options.kind} -> {options.out}")


def split(options: argparse.Namespace) -> None:
    if not 0 < options.fraction < 1:
        raise UserError(f"--fraction: expected a number between 0 and 1, found {options.fraction}")
    records = read_entries(options, options.paths, options.split)
    train, test = divide(records, options.fraction, options.seed)
    for name, part in (("train", train), ("test", test)):
        if not part:
            raise UserError(
                f"--fraction {options.fraction}: expected rows on both sides, found none for {name} "
                f"in {len({opening(record) for record in records})} different openings"
            )
    for name, part in (("train", train), ("test", test)):
        write_lines(options.out / f"{name}.jsonl", lines(part))
        print(f"{len(part)} {options.kind} -> {options.out / f'{name}.jsonl'}")


def divide(records: Iterable[Record], fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """(train, test): a record is in test where a hash of its opening and the seed falls below `fraction`."""
    sides: tuple[list[Record], list[Record]] = ([], [])
    for record in records:
        digest = hashlib.sha256(f"{seed}\0{opening(record)}".encode()).digest()
        sides[int.from_bytes(digest[:8], "big") < fraction * 2**64].append(record)
    return sides


def lines(records: list[Record]) -> Iterator[str]:
    return (json.dumps(plain_row(record), ensure_ascii=False) for record in progress(records, "writing", len(records)))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("paths", nargs="+", metavar="PATH", help="file, folder, or name on the Hugging Face hub")
    shared.add_argument("--source", choices=SOURCES, default="plain", help="published form (default: our own)")
    shared.add_argument("--kind", choices=get_args(Kind), default="comparisons", help="default: comparisons")
    shared.add_argument("--split", help="of a folder or a hub name (default: train)")
    shared.add_argument("--question", choices=QUESTIONS, help="what hh-rlhf's `chosen` answers (default: as PATH says)")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    look = commands.add_parser("inspect", parents=[shared], help="counts, lengths, labels, duplicates, leaks")
    look.add_argument("--tokenizer", help="folder or file; lengths are in its tokens (default: in words)")
    look.add_argument("--against", metavar="PATH", help="find prompts that are also there, in the same form")
    look.add_argument("--against-split", metavar="SPLIT", help="of that folder or hub name")
    look.add_argument("--out", type=Path, help="folder for summary.json and summary.png")
    look.set_defaults(run=inspect)
    make = commands.add_parser("convert", parents=[shared], help="one file of our own form")
    make.add_argument("--out", type=Path, required=True, help="the .jsonl file to make")
    make.set_defaults(run=convert)
    cut = commands.add_parser("split", parents=[shared], help="train.jsonl and test.jsonl of our own form")
    cut.add_argument("--out", type=Path, required=True, help="folder to make them in")
    cut.add_argument("--fraction", type=float, default=0.1, help="of the prompts, for test (default: 0.1)")
    cut.add_argument("--seed", type=int, default=0, help="another seed, another split (default: 0)")
    cut.set_defaults(run=split)
    for command, default in ((look, "skip"), (make, "fail"), (cut, "fail")):
        command.add_argument("--on-bad-row", choices=("fail", "skip"), default=default, help=f"default: {default}")
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
        print(f"prepare_data: error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("prepare_data: interrupted", file=sys.stderr, flush=True)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
