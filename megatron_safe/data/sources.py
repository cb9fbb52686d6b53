"""Read JSON Lines files (``.jsonl``, ``.jsonl.gz``) into records, and refuse the first bad row by file, line and field.

The rows hold offensive text on purpose. An error message therefore never repeats a text: it gives types and lengths.
"""

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_safe.data.records import Comparison, Demonstration, Prompt
from megatron_safe.errors import UserError

_SHOWN = 40  # characters of a wrong value that a message may repeat
_TYPE_NAMES = {bool: "the bool", int: "the number", float: "the number", list: "a list", dict: "an object"}
_QUOTED = ("0", "1", "true", "false", "yes", "no", "null", "none")  # the only strings that a message repeats


def read_demonstrations(paths: Sequence[str | Path]) -> list[Demonstration]:
    """Rows with ``prompt`` and ``response`` (both non-empty strings); other columns are ignored.

    Raises UserError for a file that cannot be read or has no rows, and for the first row that is not as described.
    """
    return [Demonstration(row.text("prompt"), row.text("response")) for row in read_rows(paths)]


def read_comparisons(paths: Sequence[str | Path]) -> list[Comparison]:
    """Rows in PKU-SafeRLHF's published columns; those that `Comparison` does not name are ignored.

    ``prompt`` must be non-empty, ``response_0`` and ``response_1`` may be empty (a policy may answer nothing),
    ``better_response_id`` and ``safer_response_id`` are 0 or 1; ``is_response_0_safe`` and ``is_response_1_safe`` are
    bools.

    Raises UserError for a file that cannot be read or has no rows, and for the first row that is not as described.
    """
    return [
        Comparison(
            prompt=row.text("prompt"),
            response_0=row.text("response_0", may_be_empty=True),
            response_1=row.text("response_1", may_be_empty=True),
            better_response_id=row.response_id("better_response_id"),
            safer_response_id=row.response_id("safer_response_id"),
            is_response_0_safe=row.flag("is_response_0_safe"),
            is_response_1_safe=row.flag("is_response_1_safe"),
        )
        for row in read_rows(paths)
    ]


def read_prompts(paths: Sequence[str | Path]) -> list[Prompt]:
    """Rows with ``prompt``, and optionally ``red_team`` (bool) and ``category`` (a string or null).

    Raises UserError for a file that cannot be read or has no rows, and for the first row that is not as described.
    """
    return [
        Prompt(
            prompt=row.text("prompt"),
            red_team=row.flag("red_team") if "red_team" in row.fields else False,
            category=row.text("category") if row.fields.get("category") is not None else None,
        )
        for row in read_rows(paths)
    ]


@dataclass(frozen=True, slots=True)
class _Row:
    place: str  # "file, line 12", for messages
    fields: dict[str, Any]

    def text(self, name: str, may_be_empty: bool = False) -> str:
        value = self._get(name, "a string")
        if not isinstance(value, str):
            raise self._wrong(name, "a string", _describe(value))
        if not may_be_empty and not value.strip():
            raise self._wrong(name, "a string that is not empty", f"{len(value)} blank characters")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON may escape half a surrogate pair, which no tokenizer accepts
            found = f"half a surrogate pair at character {error.start} of {len(value)}"
            raise self._wrong(name, "valid Unicode text", found) from None
        return value

    def flag(self, name: str) -> bool:
        value = self._get(name, "true or false")
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false", _describe(value))
        return value

    def response_id(self, name: str) -> int:
        value = self._get(name, "0 or 1")
        # bool is an int to Python; true here would mean a file whose columns are mixed up.
        if not isinstance(value, int) or isinstance(value, bool) or value not in (0, 1):
            raise self._wrong(name, "0 or 1", _describe(value))
        return value

    def _get(self, name: str, expected: str) -> Any:
        if name not in self.fields:
            raise self._wrong(name, expected, f"no such field (fields: {_shorten(', '.join(self.fields))})")
        return self.fields[name]

    def _wrong(self, name: str, expected: str, found: str) -> UserError:
        return UserError(f"{self.place}, field '{name}': expected {expected}, found {found}")


def read_rows(paths: Sequence[str | Path]) -> Iterator[_Row]:
    if not paths:
        raise UserError("data files: expected at least one .jsonl or .jsonl.gz file, found an empty list")
    for path in map(Path, paths):
        count = 0
        for number, line in enumerate(_lines(path), start=1):
            if line.strip():  # a blank line, such as a trailing one, carries no data
                yield _parse(f"{path}, line {number}", line)
                count += 1
        if count == 0:
            raise UserError(f"{path}: expected at least one row, found an empty file")


def _lines(path: Path) -> Iterator[bytes]:
    kind = "a .jsonl or .jsonl.gz file"
    if path.is_dir():
        raise UserError(f"{path}: expected {kind}, found a directory")
    if not path.exists():
        raise UserError(f"{path}: expected {kind}, found nothing there")
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise UserError(f"{path}: expected {kind}, found a name that ends in '{path.suffix}'")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield from file
    except (OSError, EOFError, zlib.error) as error:  # gzip reports damage as any of the three
        raise UserError(f"{path}: expected {kind}, found one that cannot be read ({error})") from None


def _parse(place: str, line: bytes) -> _Row:
    try:
        fields = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        found = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
        raise UserError(f"{place}: expected UTF-8 text, found {found}") from None
    except json.JSONDecodeError as error:
        found = f"invalid JSON ({error.msg}, column {error.colno})"
        raise UserError(f"{place}: expected a JSON object, found {found}") from None
    except (ValueError, RecursionError):  # an integer of thousands of digits, thousands of nested brackets
        raise UserError(f"{place}: expected a JSON object, found JSON too deep or with too large a number") from None
    if not isinstance(fields, dict):
        raise UserError(f"{place}: expected a JSON object, found {_describe(fields)}")
    return _Row(place, fields)


def _describe(value: Any) -> str:
    """A wrong value for a message: numbers and bools as they are, texts and containers only by type and size."""
    if value is None:
        return "null"
    if isinstance(value, (bool, int, float)):
        return f"{_TYPE_NAMES[type(value)]} {_shorten(json.dumps(value))}"
    if isinstance(value, str):
        # Ids and flags are often quoted by mistake; anything longer may be a text in the wrong column.
        return f'the string "{value}"' if value.lower() in _QUOTED else f"a string of {len(value)} characters"
    return f"{_TYPE_NAMES[type(value)]} of {len(value)} entries"


def _shorten(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
