"""Rows and their places, out of whatever a data set is published as: files, folders, names on the Hugging Face hub.

The rows hold offensive text on purpose. An error message therefore never repeats a text: it gives types and lengths.
"""

import gzip
import json
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from megatron_safe.data.records import History
from megatron_safe.errors import UserError, first_line

FILES = ".jsonl, .json (either also .gz or .xz) or .parquet"
_JSON_NAMES = tuple(f".{form}{packed}" for form in ("jsonl", "json") for packed in ("", ".gz", ".xz"))
_PARQUET_ROWS = 1024  # at a time
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)*")
_SHOWN = 40  # characters of a wrong value that a message may repeat
_PLACES = 3  # of each kind of bad rows that a report names
_TYPE_NAMES = {bool: "the bool", int: "the number", float: "the number", list: "a list", dict: "an object"}
_QUOTED = ("0", "1", "true", "false", "yes", "no", "null", "none")  # the only strings that a message repeats


class BadRow(UserError):
    """A row that is not as described. reason: what was expected of which field, the same for all rows alike."""

    def __init__(self, place: str, expected: str, found: str, name: str | None = None):
        field = f", field '{name}'" if name is not None else ""
        super().__init__(f"{place}{field}: expected {expected}, found {found}")
        self.place = place
        self.reason = (f"field '{name}': " if name is not None else "") + f"expected {expected}"


class BadRows:
    """What becomes of bad rows: where `skip` is false the first one ends the reading, else they are counted."""

    def __init__(self, skip: bool = False):
        self.skip = skip
        self.places: dict[str, list[str]] = {}  # of each reason
        self.counts: dict[str, int] = {}

    def add(self, error: BadRow) -> None:
        """Count it; raises it where bad rows are not to be skipped."""
        if not self.skip:
            raise error
        self.counts[error.reason] = self.counts.get(error.reason, 0) + 1
        places = self.places.setdefault(error.reason, [])
        if len(places) < _PLACES:
            places.append(error.place)

    def __len__(self) -> int:
        return sum(self.counts.values())

    def lines(self) -> list[str]:
        """One for each reason: how many rows, and where the first are."""
        return [
            f"{count} bad rows skipped, {reason} ({'; '.join(self.places[reason])}{'; ...' * (count > _PLACES)})"
            for reason, count in self.counts.items()
        ]


@dataclass(frozen=True, slots=True)
class Row:
    """place: "file, line 12" or "file, row 12", from 1, for messages. fields: by name, as JSON has them."""

    place: str
    fields: dict[str, Any]

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.fields.get(name) is not None

    def text(self, name: str, may_be_empty: bool = False) -> str:
        return self.check_text(name, self.get(name, "a string"), may_be_empty)

    def check_text(self, name: str, value: Any, may_be_empty: bool = False) -> str:
        """`value`, out of the field `name`, as text that a tokenizer takes; raises BadRow where it is none."""
        if not isinstance(value, str):
            raise self.wrong(name, "a string", describe(value))
        if not may_be_empty and not value.strip():
            raise self.wrong(name, "a string that is not empty", f"{len(value)} blank characters")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON may escape half a surrogate pair, which no tokenizer accepts
            found = f"half a surrogate pair at character {error.start} of {len(value)}"
            raise self.wrong(name, "valid Unicode text", found) from None
        return value

    def history(self) -> History:
        """Field `history`, what was said before the prompt: [user, assistant] pairs; empty where missing or null."""
        exchanges = self.fields["history"] if self.has("history") else []
        if not isinstance(exchanges, list):
            raise self.wrong("history", "a list of [user, assistant] pairs", describe(exchanges))
        for at, pair in enumerate(exchanges):
            if not isinstance(pair, list) or len(pair) != 2:
                raise self.wrong(f"history[{at}]", "a [user, assistant] pair", describe(pair))
        return tuple(
            (
                self.check_text(f"history[{at}][0]", user),
                self.check_text(f"history[{at}][1]", assistant, may_be_empty=True),
            )
            for at, (user, assistant) in enumerate(exchanges)
        )

    def flag(self, name: str) -> bool:
        value = self.get(name, "true or false")
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false", describe(value))
        return value

    def response_id(self, name: str, ties: bool = False) -> int | Literal["tie"]:
        """0 or 1; also "tie" where `ties` may be."""
        expected = '0, 1 or "tie"' if ties else "0 or 1"
        value = self.get(name, expected)
        if ties and value == "tie":
            return value
        # bool is an int to Python; true here would mean a file whose columns are mixed up.
        if not isinstance(value, int) or isinstance(value, bool) or value not in (0, 1):
            raise self.wrong(name, expected, describe(value))
        return value

    def names(self, name: str) -> tuple[str, ...]:
        """Those names of an object (name -> true or false) that are true. A null is false: parquet fills in columns."""
        expected = "an object of names with true or false"
        value = self.get(name, expected)
        if not isinstance(value, dict):
            raise self.wrong(name, expected, describe(value))
        for flag in value.values():
            if flag is not None and not isinstance(flag, bool):
                raise self.wrong(name, expected, f"one with {describe(flag)}")
        return tuple(self.check_text(name, key) for key, flag in value.items() if flag)

    def get(self, name: str, expected: str) -> Any:
        if name not in self.fields:
            raise self.wrong(name, expected, f"no such field (fields: {_shorten(', '.join(self.fields))})")
        return self.fields[name]

    def wrong(self, name: str, expected: str, found: str) -> BadRow:
        return BadRow(self.place, expected, found, name)


def read_rows(
    paths: Sequence[str | Path], split: str | None = None, bad_rows: BadRows | None = None
) -> Iterator[Row]:
    """The rows of each path in turn: a file, a folder in a published layout, or a name on the hub.

    A file is JSON Lines or a JSON array, packed or not, or parquet, which is read a part at a time. A folder has the
    files of a split as `{split}.jsonl` (or .json, .gz, .xz) or `{split}*.parquet`, in itself, in `data`, or in the
    folders of `data`. A hub name is `owner/name`, or `owner/name/folder` for a part of it, where no such path exists;
    it is read through `datasets`, which runs none of its code.

    split: of a folder or a hub name; default "train".
    bad_rows: what to do with rows that are no JSON objects; default: raise.

    Raises:
        UserError: for what cannot be read, or has no rows.
        BadRow: for the first bad row, unless they are skipped.
    """
    if not paths:
        raise UserError(f"data files: expected at least one {FILES} file, found an empty list")
    bad_rows = BadRows() if bad_rows is None else bad_rows
    for path in paths:
        count = 0
        for row in _rows(str(path), split, bad_rows):
            count += 1
            yield row
        if count == 0:
            found = f"{len(bad_rows)} bad ones" if len(bad_rows) else "an empty file"
            raise UserError(f"{path}: expected at least one row, found {found}")


def _rows(name: str, split: str | None, bad_rows: BadRows) -> Iterator[Row]:
    path = Path(name)
    if path.is_dir():
        for file in split_files(path, split or "train"):
            yield from _file_rows(file, bad_rows)
    elif not path.exists() and _HUB_NAME.fullmatch(name) and not name.endswith((*_JSON_NAMES, ".parquet")):
        yield from _hub_rows(name, split or "train")
    elif split is not None:
        raise UserError(f"{path}: expected a folder or a hub name for split '{split}', found a file's name")
    else:
        yield from _file_rows(path, bad_rows)


def _file_rows(path: Path, bad_rows: BadRows) -> Iterator[Row]:
    kind = f"a {FILES} file"
    if not path.exists():
        raise UserError(f"{path}: expected {kind}, found nothing there")
    if path.name.endswith(".parquet"):
        yield from _parquet_rows(path)
    elif path.name.endswith(_JSON_NAMES):
        yield from _json_rows(path, bad_rows)
    else:
        raise UserError(f"{path}: expected {kind}, found a name that ends in '{path.suffix}'")


# Folders.


def split_files(folder: Path, split: str) -> list[Path]:
    """The files of a split, in order; raises UserError where there are none, or the same rows may be there twice."""
    data = folder / "data"
    levels = [[folder], [data], sorted(path for path in data.glob("*") if path.is_dir())]
    for level in levels:
        found = []
        for place in level:
            names = {f"{split}{name}" for name in _JSON_NAMES}
            rows = [path for path in sorted(place.glob("*")) if path.name in names]
            tables = [path for path in sorted(place.glob(f"{split}*.parquet")) if not path.name[len(split)].isalnum()]
            forms = [*rows, *tables[:1]]
            if len(forms) > 1:
                listed = ", ".join(path.name for path in forms)
                raise UserError(f"{place}: expected one form of split '{split}', found {listed}; name the file")
            found += rows or tables
        if found:
            return found
    there = sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.name.endswith((*_JSON_NAMES, ".parquet"))
    )
    listed = ", ".join(there[:8]) + (f" and {len(there) - 8} more" if len(there) > 8 else "") or "no data files"
    raise UserError(
        f"{folder}: expected {split}.jsonl, {split}.json (.gz, .xz) or {split}*.parquet there or in data/, "
        f"found {listed}"
    )


# JSON.


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.open(path)
    return lzma.open(path) if path.suffix == ".xz" else path.open("rb")


def _json_rows(path: Path, bad_rows: BadRows) -> Iterator[Row]:
    lines = _lines(path)
    first = True
    for number, line in enumerate(lines, start=1):
        if not line.strip():  # a blank line, such as a trailing one, carries no data
            continue
        if first and line.lstrip().startswith(b"["):
            # An array, whatever the name: hh-rlhf's red_team_attempts.jsonl.gz is one.
            yield from _array_rows(path, number, line + b"".join(lines), bad_rows)
            return
        first = False
        try:
            row = _row(f"{path}, line {number}", _parse(path, number, line, "a JSON object"))
        except BadRow as error:
            bad_rows.add(error)
        else:
            yield row


def _lines(path: Path) -> Iterator[bytes]:
    number = 0
    try:
        with _open(path) as file:
            for line in file:
                number += 1
                yield line
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:  # gzip reports damage as any of the first three
        where = f" after line {number}" if number else ""
        raise UserError(f"{path}: expected a {FILES} file, found one that cannot be read{where} ({error})") from None


def _array_rows(path: Path, first: int, content: bytes, bad_rows: BadRows) -> Iterator[Row]:
    try:
        values = _parse(path, first, content, "a JSON array")
    except BadRow as error:  # of the whole file: there are no other rows to go on with
        raise UserError(str(error)) from None
    for number, value in enumerate(values, start=1):
        try:
            row = _row(f"{path}, row {number}", value)
        except BadRow as error:
            bad_rows.add(error)
        else:
            yield row


def _parse(path: Path, first: int, content: bytes, expected: str) -> Any:
    """The JSON value of `content`, which begins at line `first`. Raises BadRow with the line of what is wrong."""
    place = f"{path}, line {first}"
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line, column = first + before.count(b"\n"), error.start - (before.rfind(b"\n") + 1)
        found = f"byte 0x{content[error.start]:02x} at column {column + 1}"
        raise BadRow(f"{path}, line {line}", "UTF-8 text", found) from None
    except json.JSONDecodeError as error:
        place = f"{path}, line {first + error.lineno - 1}"
        raise BadRow(place, expected, f"invalid JSON ({error.msg}, column {error.colno})") from None
    except (ValueError, RecursionError):  # an integer of thousands of digits, thousands of nested brackets
        raise BadRow(place, expected, "JSON too deep or with too large a number") from None


def _row(place: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise BadRow(place, "a JSON object", describe(value))
    return Row(place, value)


# Parquet and the hub.


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow: pip install megatron-safe[data]") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}, row {number}", fields)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        where = f" after row {number}" if number else ""
        found = f"one that cannot be read{where} ({first_line(error)})"
        raise UserError(f"{path}: expected a parquet file, found {found}") from None


def _hub_rows(name: str, split: str) -> Iterator[Row]:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{name}: expected a path, found nothing there; reading it as a name on the Hugging Face hub needs "
            "datasets: pip install megatron-safe[data]"
        ) from None
    owner, dataset, *folders = name.split("/")
    try:
        rows = datasets.load_dataset(f"{owner}/{dataset}", data_dir="/".join(folders) or None, split=split)
    except Exception as error:  # whatever the hub's client and its formats raise: there is no common ancestor
        raise UserError(
            f"{name}: expected a path or a data set on the Hugging Face hub with split '{split}', found neither "
            f"({type(error).__name__}: {first_line(error)})"
        ) from None
    return _numbered(f"{name} {split}", rows)


def _numbered(name: str, rows: Iterable[dict[str, Any]]) -> Iterator[Row]:
    return (Row(f"{name}, row {number}", dict(fields)) for number, fields in enumerate(rows, start=1))


# Words for messages.


def describe(value: Any) -> str:
    """A wrong value for a message: numbers and bools as they are, texts and containers only by type and size."""
    if value is None:
        return "null"
    if isinstance(value, str):
        # Ids and flags are often quoted by mistake; anything longer may be a text in the wrong column.
        return f'the string "{value}"' if value.lower() in _QUOTED else f"a string of {len(value)} characters"
    if isinstance(value, (bool, int, float)):
        return f"{_TYPE_NAMES[type(value)]} {_shorten(json.dumps(value))}"
    if isinstance(value, (list, dict)):
        return f"{_TYPE_NAMES[type(value)]} of {len(value)} entries"
    return f"a {type(value).__name__}"  # parquet has types of its own, such as dates


def _shorten(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
