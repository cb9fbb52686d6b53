"""What a job of many stages has finished, in OUT/rounds.json."""

import json
import os
import time
from pathlib import Path

from megatron_safe.errors import UserError
from megatron_safe.runtime import Runtime


class Progress:
    """The names of the steps that are finished, the same on every rank.

    A step is finished when its name is in the file, which is written after all that the step wrote.

    started: when the job would have begun, on this process's monotonic clock, had it never been stopped.
    """

    def __init__(self, folder: Path, runtime: Runtime):
        """Raises UserError for a file that is not ours."""
        self.path, self.runtime = folder / "rounds.json", runtime
        self._finished, seconds = runtime.on_main(self._read)
        self.started = time.monotonic() - seconds

    def __contains__(self, name: str) -> bool:
        return name in self._finished

    def __bool__(self) -> bool:
        return bool(self._finished)

    def add(self, name: str) -> None:
        self.runtime.barrier()  # every rank is through with the step
        self._finished.append(name)
        self.runtime.on_main(self._write)

    def _read(self) -> tuple[list[str], float]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            finished, seconds = content["finished"], float(content["seconds"])
        except FileNotFoundError:
            return [], 0.0
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path}: expected the progress of a job, found {type(error).__name__}") from None
        if not (isinstance(finished, list) and all(isinstance(name, str) for name in finished)):
            raise UserError(f"{self.path}: expected a list of names as 'finished', found something else")
        return finished, seconds

    def _write(self) -> None:
        hidden = self.path.with_name(f".{self.path.name}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            content = {"finished": self._finished, "seconds": round(time.monotonic() - self.started, 1)}
            hidden.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            os.replace(hidden, self.path)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error}") from error
