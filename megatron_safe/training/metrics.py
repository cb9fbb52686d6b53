"""What a stage shows while it runs: metrics.jsonl, TensorBoard, W&B, a progress bar, seconds and tokens/s by phase."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from megatron_safe.errors import UserError

_PPO_HEADLINE = ("reward", "cost", "j_c", "lambda", "kl")
HEADLINE_METRICS = {
    "sft": ("loss", "accuracy"),
    "reward": ("loss", "accuracy"),
    "cost": ("loss", "accuracy", "sign_accuracy"),
    "ppo": _PPO_HEADLINE,
    "ppo-lag": _PPO_HEADLINE,
    "ppo-reward-shaping": _PPO_HEADLINE,
}
"""The few metrics shown beside the bar, by stage; those a step did not log are left out."""

_PLAIN_LINE_SECONDS = 5.0


class MetricsLog:
    """Every number a stage logs, one step at a time; on ranks other than the writer each method does nothing.

    `folder/metrics.jsonl` gets one line `{"step": n, name: value, ...}` per step, flushed before `log` returns. Values
    keep the precision of Python's `repr`; NaN and infinities become `null`, because JSON has no word for them and a
    reader in another language would stop at the line. TensorBoard, under `folder/tensorboard`, gets them as they are.
    """

    def __init__(
        self,
        folder: Path,
        stage: str,
        total_steps: int,
        is_writer: bool,
        tensorboard: bool = True,
        wandb_project: str | None = None,
    ):
        """Raises UserError if TensorBoard or W&B is asked for and not installed (on the writer only)."""
        self._is_writer = is_writer
        if not is_writer:
            return
        self._path = Path(folder) / "metrics.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._lines = None
        self._last_step = 0
        self._summary_writer_class = _import_summary_writer() if tensorboard else None
        self._tensorboard = None
        self._purge_step = None
        self._wandb_run = _start_wandb(wandb_project, self._path.parent) if wandb_project else None
        self._progress = (_Bar if sys.stderr.isatty() else _PlainLines)(stage, total_steps)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record the metrics of one finished step. Steps count from 1 and must grow; ValueError otherwise."""
        if not self._is_writer:
            return
        if step <= self._last_step:
            raise ValueError(f"step {step} logged after step {self._last_step} in {self._path}")
        if "step" in values:
            raise ValueError("'step' is the key of the line itself, not a metric")
        values = {name: float(value) for name, value in values.items()}
        record = {"step": step} | {name: v if math.isfinite(v) else None for name, v in values.items()}
        if self._lines is None:
            self._lines = self._path.open("a", encoding="utf-8")
        self._lines.write(json.dumps(record, allow_nan=False) + "\n")
        self._lines.flush()
        self._last_step = step
        if self._summary_writer_class is not None:
            # Opened late, so that a resume can first say from which step on older events are void.
            if self._tensorboard is None:
                self._tensorboard = self._summary_writer_class(
                    str(self._path.parent / "tensorboard"), purge_step=self._purge_step
                )
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb_run is not None:
            self._wandb_run.log({"step": step} | values)
        self._progress.update(step, values)

    def truncate_after(self, step: int) -> None:
        """Forget what was logged after `step`, the step a run resumes from, so that no step appears twice.

        A last line cut short by a crash is dropped too. Raises UserError if any other line cannot be read.
        """
        if not self._is_writer:
            return
        self._close_files()
        if self._path.exists():
            kept = [line for line, record in _read_lines(self._path) if record["step"] <= step]
            temporary = self._path.with_name(self._path.name + ".tmp")
            with temporary.open("w", encoding="utf-8") as file:
                file.writelines(line + "\n" for line in kept)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._path)
        self._last_step = step
        self._purge_step = step + 1
        self._progress.start_from(step)

    def close(self) -> None:
        """Flush and end everything; harmless when called twice."""
        if not self._is_writer:
            return
        self._close_files()
        if self._wandb_run is not None:
            self._wandb_run.finish()
            self._wandb_run = None
        self._progress.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _close_files(self) -> None:
        if self._lines is not None:
            self._lines.close()
            self._lines = None
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None


def _read_lines(path: Path) -> list[tuple[str, dict]]:
    """The file's lines, as text and parsed; without the last one if a crash cut it short."""
    *lines, tail = path.read_text(encoding="utf-8", errors="replace").split("\n")
    parsed = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise TypeError
        except (json.JSONDecodeError, KeyError, TypeError):
            raise UserError(f'{path}, line {number}: expected {{"step": n, ...}}, found {line[:60]!r}') from None
        parsed.append((line, record))
    return parsed


def _import_summary_writer() -> type:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("TensorBoard is on but not installed: pip install tensorboard, or turn it off") from None
    return SummaryWriter


def _start_wandb(project: str, folder: Path):
    try:
        import wandb
    except ImportError:
        raise UserError(f"W&B project {project!r} is given but wandb is not installed: pip install wandb") from None
    # The run's id lives in the run folder, so that a resumed run continues its own W&B page.
    id_file = folder / "wandb_run_id"
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex, encoding="utf-8")
    run_id = id_file.read_text(encoding="utf-8").strip()
    run = wandb.init(project=project, name=folder.name, dir=str(folder), id=run_id, resume="allow")
    # W&B's own step never goes back; ours does, when a run resumes from an earlier checkpoint.
    run.define_metric("*", step_metric="step")
    return run


def _headline(stage: str, values: dict[str, float]) -> str:
    return "  ".join(f"{name} {values[name]:.4g}" for name in HEADLINE_METRICS.get(stage, ()) if name in values)


class _Bar:
    """The progress bar of a terminal."""

    def __init__(self, stage: str, total_steps: int):
        self._stage = stage
        self._bar = tqdm(desc=stage, total=total_steps, dynamic_ncols=True, file=sys.stderr)

    def start_from(self, step: int) -> None:
        self._bar.initial = step  # keeps the remaining time honest: those steps took none of this process's time
        self._bar.n = step
        self._bar.refresh()

    def update(self, step: int, values: dict[str, float]) -> None:
        self._bar.set_postfix_str(_headline(self._stage, values), refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        self._bar.close()


class _PlainLines:
    """Progress as lines for a log file: the first and the last step, and between them one per 5 s or per tenth."""

    def __init__(self, stage: str, total_steps: int):
        self._stage, self._total_steps = stage, total_steps
        self._start, self._start_step = time.monotonic(), 0
        self._printed_at = -math.inf
        self._printed_tenth = 0
        self._pending = None

    def start_from(self, step: int) -> None:
        self._start, self._start_step = time.monotonic(), step
        self._printed_tenth = 10 * step // max(self._total_steps, 1)

    def update(self, step: int, values: dict[str, float]) -> None:
        now = time.monotonic()
        tenth = 10 * step // max(self._total_steps, 1)
        elapsed = now - self._start
        left = elapsed * max(self._total_steps - step, 0) / max(step - self._start_step, 1)
        clock = f"{tqdm.format_interval(elapsed)}, {tqdm.format_interval(left)} left"
        self._pending = f"{self._stage} {step}/{self._total_steps}  {_headline(self._stage, values)}  [{clock}]"
        if now - self._printed_at >= _PLAIN_LINE_SECONDS or tenth > self._printed_tenth or step >= self._total_steps:
            self._print(now, tenth)

    def _print(self, now: float, tenth: int) -> None:
        print(self._pending, file=sys.stderr, flush=True)
        self._printed_at, self._printed_tenth, self._pending = now, tenth, None

    def close(self) -> None:
        if self._pending is not None:  # a run that ended early still shows its last step
            self._print(time.monotonic(), self._printed_tenth)


@dataclass
class Phase:
    """One timed stretch; `tokens` may be set inside it, where the number is known only at the end."""

    tokens: int = 0


class PhaseTimer:
    """Wall-clock seconds and tokens by phase, added up over repeated phases of one name until `report`.

    On a GPU each phase begins and ends with a synchronisation: its kernels are counted where they were asked for.
    """

    def __init__(self):
        self._seconds: dict[str, float] = {}
        self._tokens: dict[str, int] = {}

    @contextmanager
    def phase(self, name: str, tokens: int = 0) -> Iterator[Phase]:
        """Time the body of a `with`. `tokens`: tokens handled on this rank, or set `.tokens` on what is yielded."""
        current = Phase(tokens)
        _synchronize()
        start = time.perf_counter()
        try:
            yield current
        finally:
            _synchronize()
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start
            self._tokens[name] = self._tokens.get(name, 0) + current.tokens

    def report(self) -> dict[str, float]:
        """`seconds/<phase>`, and `tokens_per_second/<phase>` where tokens were counted; then start from zero."""
        report = {f"seconds/{name}": seconds for name, seconds in self._seconds.items()}
        for name, tokens in self._tokens.items():
            if tokens and self._seconds[name] > 0:
                report[f"tokens_per_second/{name}"] = tokens / self._seconds[name]
        self._seconds, self._tokens = {}, {}
        return report


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_memory_gib() -> float:
    """This process's peak in GiB: allocated GPU memory where CUDA is in use, else the resident set's peak."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
