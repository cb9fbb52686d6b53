"""The life of a run folder: who may write into it, where a run goes on, when it checkpoints and stops."""

import json
from pathlib import Path

import yaml

from megatron_safe.config import RunConfig, to_dict
from megatron_safe.errors import UserError
from megatron_safe.models.roles import Role
from megatron_safe.runtime import Runtime
from megatron_safe.training import checkpoint
from megatron_safe.training.metrics import MetricsLog


class Run:
    """A stage's run folder, open for writing."""

    def __init__(self, config, stage: str, total_steps: int, runtime: Runtime):
        """Claim the folder and find the checkpoint to go on from (`resume`; None for a fresh start).

        Raises:
            UserError: the folder holds a run and `run.resume` is "no", or the run of another stage or seed, or all its
                checkpoints are damaged.
        """
        self.config: RunConfig = config.run
        self.runtime = runtime
        self.folder = Path(config.run.out)
        self.total_steps = total_steps
        used = (self.folder / "config.yaml").exists() or checkpoint.has_checkpoints(self.folder)
        if used and self.config.resume == "no":
            raise UserError(
                f"run.out {self.folder}: holds a run already; choose another folder, or --run.resume auto to go on"
            )
        check_stage(self.folder, stage)
        self.resume = checkpoint.find(self.folder, runtime) if checkpoint.has_checkpoints(self.folder) else None
        if self.resume is not None and self.resume.seed != self.config.seed:
            raise UserError(
                f"run.seed: expected {self.resume.seed}, the seed of the run in {self.folder}, found {self.config.seed}"
            )
        runtime.barrier()  # every rank has looked before rank 0 writes
        self._claimed = not used  # until the first step: what is refused by then leaves the folder free
        try:
            self.log = MetricsLog(
                self.folder, stage, total_steps, runtime.is_main, self.config.tensorboard, self.config.wandb_project
            )
            if runtime.is_main:
                write_config(self.folder, stage, config)
        except OSError as error:
            raise UserError(f"run.out {self.folder}: cannot be written: {error}") from error
        self.first_step = self.resume.step if self.resume else 0
        self.log.truncate_after(self.first_step)

    def finish_step(self, step: int, values: dict[str, float], roles: list[Role], state: dict) -> bool:
        """Log step `step` (from 1), checkpoint where one is due; True when the run shall stop here."""
        self.log.log(step, values)
        self._claimed = False
        stop = step == self.total_steps or step == self.config.stop_after
        due = self.config.save_every and step % self.config.save_every == 0
        if stop or due:
            checkpoint.save(
                self.folder, step, roles, state, self.config.seed, self.runtime, self.config.keep_last
            )
        return stop

    def write_json(self, name: str, content) -> None:
        """A result beside metrics.jsonl, written by rank 0 and there for all when this returns."""
        if self.runtime.is_main:
            (self.folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        self.runtime.barrier()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind, *exception) -> None:
        self.log.close()
        if kind is not None and self._claimed and self.runtime.is_main:
            (self.folder / "config.yaml").unlink(missing_ok=True)


def check_stage(folder: Path, stage: str) -> None:
    """Raise UserError when the folder holds the run of another stage."""
    config = folder / "config.yaml"
    try:
        found = yaml.safe_load(config.read_text(encoding="utf-8"))["stage"] if config.exists() else stage
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise UserError(f"{config}: expected the config of a run, found {type(error).__name__}") from error
    if found != stage:
        raise UserError(f"run.out {folder}: expected a run of {stage} or a new folder, found one of {found}")


def write_config(folder: Path, stage: str, config) -> None:
    """The resolved config, which says whose the folder is."""
    text = yaml.safe_dump({"stage": stage, **to_dict(config)}, sort_keys=False, allow_unicode=True)
    (folder / "config.yaml").write_text(text, encoding="utf-8")


def check_batch(global_size: int, runtime: Runtime, field: str) -> None:
    """Raise UserError unless every data-parallel rank gets as many rows."""
    if global_size <= 0 or global_size % runtime.dp_size:
        raise UserError(
            f"{field}: expected a positive multiple of the data-parallel size {runtime.dp_size}, found {global_size}"
        )
