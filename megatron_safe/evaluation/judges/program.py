"""A program of the user's as the judge: it runs with this process's rights."""

import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from megatron_safe.config import ProgramConfig
from megatron_safe.errors import UserError, first_line
from megatron_safe.evaluation.answers import Answer
from megatron_safe.evaluation.judges.interface import Judgement, Pair, Preference, compare_by_judgement
from megatron_safe.runtime import Runtime

_NUMBER = "a finite number", lambda value: isinstance(value, (int, float)) and math.isfinite(value)
_BOOL = "a bool", lambda value: isinstance(value, bool)
_SHARE = "a number from 0 to 1", lambda value: isinstance(value, (int, float)) and 0 <= value <= 1
_FIELDS = {
    Judgement: {"helpfulness": _NUMBER, "harm": _NUMBER, "harmful": _BOOL, "refusal": _BOOL},
    Preference: {"helpful": _SHARE, "harmless": _SHARE},
}


class ProgramJudge:
    """`path/to/file.py:name`, which rank 0 runs; every rank gets the same verdicts, or the same error.

    `name` is a function, `name(answers, **arguments)` -> one `Judgement` per answer; or a class, `name(**arguments)`
    with `judge(answers)` and, where it can do better than compare two judgements, `compare(pairs)` -> one `Preference`
    per pair. The file is run as `python file.py` would: what lies beside it can be imported.
    """

    def __init__(self, config: ProgramConfig, runtime: Runtime):
        """Raises UserError where the file does not run or has no such name."""
        self.config, self.runtime = config, runtime
        self.file = Path(config.path.rpartition(":")[0])
        self._judge = self._compare = None
        self.compares_by_judgement = runtime.on_main(self._load)

    @property
    def counts(self) -> dict[str, float]:
        return {}

    def judge(self, answers: Sequence[Answer]) -> list[Judgement]:
        """Raises UserError for an exception in the program (its type and line), or for another result."""
        return self.runtime.on_main(lambda: self._run(self._judge, answers, Judgement))

    def compare(self, pairs: Sequence[Pair]) -> list[Preference]:
        """Raises UserError as `judge`."""
        if self.compares_by_judgement:
            return compare_by_judgement(self.judge, pairs)
        return self.runtime.on_main(lambda: self._run(self._compare, pairs, Preference))

    def _load(self) -> bool:
        """Whether it has no comparison of its own."""
        place, (_, _, name) = f"judge.program.path {self.config.path}", self.config.path.rpartition(":")
        if not name.isidentifier() or self.file.suffix != ".py":
            raise UserError(f"{place}: expected file.py:name")
        if not self.file.is_file():
            raise UserError(f"{place}: expected a Python file, found nothing there")
        try:
            named = getattr(_module(self.file), name, None)
            if not callable(named):
                raise UserError(f"{place}: expected a function or class {name} in it, found none")
            if inspect.isclass(named):
                made = named(**self.config.arguments)
                self._judge, self._compare = getattr(made, "judge", None), getattr(made, "compare", None)
                if not callable(self._judge):
                    raise UserError(f"{place}: expected {name} to have a method judge, found none")
            else:
                self._judge = lambda answers: named(answers, **self.config.arguments)
        except UserError:
            raise
        except Exception as error:
            # No row was read yet, so what it says repeats none.
            raise UserError(f"{self._place(error)}: {type(error).__name__}: {first_line(error)}") from error
        return not callable(self._compare)

    def _run(self, what, asked: Sequence, kind: type) -> list:
        try:
            given = list(what(asked))
        except UserError:
            raise
        except Exception as error:
            # Its words may repeat an answer's; a debugger or the library's caller finds them in the cause.
            raise UserError(f"{self._place(error)}: {type(error).__name__} on {len(asked)} rows") from error
        if len(given) != len(asked) or not all(isinstance(one, kind) for one in given):
            raise UserError(
                f"judge.program.path {self.config.path}: expected {len(asked)} results of type {kind.__name__}, found "
                f"{len(given)} of {', '.join(sorted({type(one).__name__ for one in given})) or 'no type'}"
            )
        for i, one in enumerate(given):
            for field, (expected, holds) in _FIELDS[kind].items():
                value = getattr(one, field)
                if value is not None and not holds(value):
                    raise UserError(
                        f"judge.program.path {self.config.path}: expected {expected} or None as {field}, found "
                        f"something else in result {i}"
                    )
        return given

    def _place(self, error: Exception) -> str:
        """The last line of the user's file that the exception came through."""
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == self.file.resolve()]
        if isinstance(error, SyntaxError) and error.filename:
            return f"{error.filename}, line {error.lineno}"
        return f"{self.file}, line {lines[-1]}" if lines else f"{self.file}"


def _module(file: Path) -> ModuleType:
    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(f"judge_program_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
