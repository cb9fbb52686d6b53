"""Writing files that are whole or not there."""

import os
from collections.abc import Iterable
from pathlib import Path

from megatron_safe.errors import UserError


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Lines of UTF-8 text, published by rename: a file that can be seen is whole. Makes the folder where there is none.

    Raises UserError where it cannot be written; what stood there before is left as it was.
    """
    hidden = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with hidden.open("w", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in lines)
            os.replace(hidden, path)
        finally:
            hidden.unlink(missing_ok=True)
    except (OSError, UnicodeEncodeError) as error:
        raise UserError(f"{path}: cannot be written: {error}") from error
