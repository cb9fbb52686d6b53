"""Replies of an endpoint on disk, one JSON line each, so that no question is paid for twice.

A line holds `key` (see `question_key`), `reply` (null where a reply was paid for and lost on the way), `input_tokens`,
`output_tokens` and `dollars`. Lines are only ever added.
"""

import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_safe.errors import UserError


@dataclass(frozen=True, slots=True)
class Line:
    key: str
    reply: str | None
    input_tokens: int
    output_tokens: int
    dollars: float


def question_key(model: str, url: str, parameters: dict, prompt: str, attempt: int) -> str:
    """What tells one request from another, as a SHA-256 in hexadecimal. attempt: 1 where the first reply was useless.

    Equal numbers in other types (0 and 0.0) are equal parameters.
    """
    plain = {name: float(value) if type(value) is int else value for name, value in parameters.items()}
    parts = [model, url, plain, prompt, attempt]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class ReplyCache:
    """The file at `path`, which is read at once and made with the first reply. Safe for threads, not for two jobs."""

    def __init__(self, path: Path, say: Callable[[str], None]):
        """Raises UserError for a file that cannot be read or holds anything but our lines.

        A last line without its end is what a killed run leaves: it is cut off, and `say` says so.
        """
        self.path = path
        self._lock = threading.Lock()
        self._replies: dict[str, str] = {}
        self.dollars = 0.0
        try:
            content = path.read_bytes() if path.exists() else b""
            whole = content.rfind(b"\n") + 1
            for number, line in enumerate(content[:whole].splitlines(), start=1):
                self._take(_parse(line, f"{path}, line {number}"))
            if whole < len(content):
                say(f"{path}: left out its last line, which is only half written")
                with path.open("r+b") as file:
                    file.truncate(whole)
        except OSError as error:
            raise UserError(f"{path}: expected an endpoint's replies, found a file that fails: {error}") from None

    def __len__(self) -> int:
        return len(self._replies)

    def get(self, key: str) -> str | None:
        return self._replies.get(key)

    def add(self, line: Line) -> None:
        """Raises OSError where it cannot be written; the line is in the file before it counts."""
        text = json.dumps(asdict(line)) + "\n"
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
            self._take(line)

    def _take(self, line: Line) -> None:
        self.dollars += line.dollars
        if line.reply is not None:
            self._replies[line.key] = line.reply


def _parse(line: bytes, place: str) -> Line:
    try:
        parsed = Line(**json.loads(line))
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"{place}: expected an endpoint's reply as a JSON object, found something else") from None
    if not (
        isinstance(parsed.key, str)
        and (parsed.reply is None or isinstance(parsed.reply, str))
        and all(type(number) in (int, float) for number in (parsed.input_tokens, parsed.output_tokens, parsed.dollars))
    ):
        raise UserError(f"{place}: expected an endpoint's reply, found fields of other types")
    return parsed
