"""A program of the user's as the judge: it runs with this process's rights."""

import inspect
import math
from collections.abc import Sequence

from megatron_safe.config import ProgramConfig
from megatron_safe.errors import UserError
from megatron_safe.evaluation.answers import Answer
from megatron_safe.evaluation.judges.interface import Judgement, Pair, Preference, compare_by_judgement
from megatron_safe.programs import Program
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
        self._program = program = Program(self.config.path, "judge.program.path")
        if inspect.isclass(program.named):
            made = program.guard(lambda: program.named(**self.config.arguments), say=True)
            self._judge, self._compare = getattr(made, "judge", None), getattr(made, "compare", None)
            if not callable(self._judge):
                raise UserError(f"{program.place}: expected a method judge of the class, found none")
        else:
            self._judge = lambda answers: program.named(answers, **self.config.arguments)
        return not callable(self._compare)

    def _run(self, what, asked: Sequence, kind: type) -> list:
        given = self._program.guard(lambda: list(what(asked)), rows=len(asked))
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
