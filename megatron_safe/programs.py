"""Programs of the user's, named `path/to/file.py:name`. They run with this process's rights."""

import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_safe.errors import UserError, first_line


class Program:
    """A function or class of the user's; whatever fails in it is one line that names its file and line.

    The file is run as `python file.py` would: what lies beside it can be imported.
    """

    def __init__(self, path: str, setting: str):
        """setting: that names the path, for messages. Raises UserError where the file does not run or lacks the name.
        """
        self.place = f"{setting} {path}"
        file, _, name = path.rpartition(":")
        self.file = Path(file)
        if not name.isidentifier() or self.file.suffix != ".py":
            raise UserError(f"{self.place}: expected file.py:name")
        if not self.file.is_file():
            raise UserError(f"{self.place}: expected a Python file, found nothing there")
        # No row was read yet, so what an error here says repeats none.
        self.named = getattr(self.guard(lambda: _module(self.file), say=True), name, None)
        if not callable(self.named):
            raise UserError(f"{self.place}: expected a function or class {name} in it, found none")

    def guard(self, act: Callable[[], Any], rows: int = 0, say: bool = False) -> Any:
        """What `act`, which calls the program, returns.

        Raises UserError for an exception in it: its type and line, and where `say` is set its words, which may repeat a
        row's; else a debugger or the library's caller finds them in the cause.
        """
        try:
            return act()
        except UserError:
            raise
        except Exception as error:
            words = first_line(error) if say else f"on {rows} rows"
            raise UserError(f"{self._line(error)}: {type(error).__name__}: {words}") from error

    def _line(self, error: Exception) -> str:
        """The last line of the user's file that the exception came through."""
        if isinstance(error, SyntaxError) and error.filename:
            return f"{error.filename}, line {error.lineno}"
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == self.file.resolve()]
        return f"{self.file}, line {lines[-1]}" if lines else f"{self.file}"


def _module(file: Path) -> ModuleType:
    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(f"user_program_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
