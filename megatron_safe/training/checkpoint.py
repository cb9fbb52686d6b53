"""What is on disk: weights and optimizers through dist_checkpointing, the rest as JSON.

    RUN/checkpoints/step_00000120/
        weights/        every saved role, sharded; loads in any layout
        state.json      step, architectures, and the loop's own state (λ and its cost window, ...)
        manifest.json   size and CRC-32 of every file

A checkpoint is written under a hidden name and published by one rename, so a name that can be seen is whole; the
manifest finds what was damaged later. No generator state is stored because none is used: data order and sampling are
functions of the seed, the step and the sample.
"""

import dataclasses
import json
import os
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_safe.config import ModelConfig
from megatron_safe.errors import UserError
from megatron_safe.models.llama import architecture
from megatron_safe.models.roles import Role
from megatron_safe.runtime import Runtime

FORMAT = 1
# A role may start from its own weights or from those that come before it in the paper's order of stages.
_SOURCES = {
    "actor": ("actor",),
    "reference": ("actor",),
    "reward_model": ("reward_model", "actor"),
    "cost_model": ("cost_model", "actor"),
    "reward_critic": ("reward_critic", "reward_model"),
    "cost_critic": ("cost_critic", "cost_model"),
}


@dataclass(frozen=True)
class Checkpoint:
    """One published checkpoint: where it is and what its state.json says."""

    path: Path
    step: int
    seed: int
    roles: dict[str, dict]
    state: dict

    @staticmethod
    def read(path: Path) -> "Checkpoint":
        try:
            content = json.loads((path / "state.json").read_text())
            if content["format"] != FORMAT:
                raise UserError(f"{path / 'state.json'}: expected format {FORMAT}, found {content['format']}")
            return Checkpoint(path, content["step"], content["seed"], content["roles"], content["state"])
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path / 'state.json'}: expected a checkpoint's state, found {error!r}") from error

    def source_for(self, role: str) -> str:
        """The saved role that `role` starts from."""
        for name in _SOURCES[role]:
            if name in self.roles:
                return name
        wanted = " or ".join(_SOURCES[role])
        raise UserError(f"{self.path}: expected {wanted} to start {role} from, found {', '.join(self.roles)}")


def save(
    run: Path, step: int, roles: list[Role], state: dict, seed: int, runtime: Runtime, keep_last: int
) -> Path:
    """Write and publish `run`/checkpoints/step_N on all ranks together, then delete all but the `keep_last` newest.

    Args:
        roles: with their optimizers, where they have one.
        state: JSON-serialisable state of the training loop, the same on every rank.

    Raises:
        OSError: on every rank when any rank could not write (disk full, permissions); nothing is published.
    """
    folder = run / "checkpoints"
    final, hidden = folder / f"step_{step:08d}", folder / f".step_{step:08d}.tmp"
    if runtime.is_main:
        shutil.rmtree(hidden, ignore_errors=True)
        (hidden / "weights").mkdir(parents=True)
    runtime.barrier()
    dist_checkpointing.save(_sharded(roles, loading=False), str(hidden / "weights"))
    runtime.barrier()
    if runtime.is_main:
        content = {
            "format": FORMAT,
            "step": step,
            "seed": seed,
            "roles": {
                role.name: {"model": architecture(role.model), "vocab_size": role.vocab_size} for role in roles
            },
            "state": state,
        }
        (hidden / "state.json").write_text(json.dumps(content, indent=1))
    runtime.barrier()
    sums = _over_ranks(sorted(path for path in hidden.rglob("*") if path.is_file()), _fingerprint, runtime)
    if runtime.is_main:
        manifest = {str(path.relative_to(hidden)): found for path, found in sums.items()}
        (hidden / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for path in hidden.rglob("*"):
            _sync(path)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(hidden, final)
        _sync(folder)
        for old in _published(run)[:-keep_last] if keep_last > 0 else []:
            shutil.rmtree(old)
    runtime.barrier()
    return final


def find(path: str | Path, runtime: Runtime) -> Checkpoint:
    """The checkpoint at `path`, or the newest good one of the run folder at `path`; checked file by file.

    Damaged checkpoints of a run folder are named on rank 0 and passed over.

    Raises:
        UserError: nothing there, or nothing that is whole.
    """
    path = Path(path)
    if (path / "manifest.json").exists() or (path / "state.json").exists():
        problem = _damage(path, runtime)
        if problem:
            raise UserError(f"checkpoint is damaged: {problem}")
        return Checkpoint.read(path)
    problems = []
    for candidate in reversed(_published(path)):
        problem = _damage(candidate, runtime)
        if not problem:
            return Checkpoint.read(candidate)
        problems.append(problem)
        runtime.print(f"warning: checkpoint is damaged, using the one before: {problem}")
    if problems:
        raise UserError(f"{path}: no good checkpoint is left: {problems[0]}")
    raise UserError(f"{path}: expected a checkpoint or a run folder with one in checkpoints/, found none")


def has_checkpoints(run: Path) -> bool:
    return bool(_published(run))


def resolve_model(
    model: ModelConfig, role: str, vocab_size: int, runtime: Runtime
) -> tuple[ModelConfig, Checkpoint | None]:
    """A role's architecture: its checkpoint's where it names one, else the config's.

    Raises:
        UserError: no such checkpoint, nothing in it that the role can start from, or another tokenizer's vocabulary.
    """
    if model.checkpoint is None:
        return model, None
    checkpoint = find(model.checkpoint, runtime)
    saved = checkpoint.roles[checkpoint.source_for(role)]
    if saved["vocab_size"] != vocab_size:
        raise UserError(
            f"{role}.checkpoint {checkpoint.path}: expected the tokenizer's vocabulary of {vocab_size} tokens, "
            f"found a model of {saved['vocab_size']}"
        )
    return dataclasses.replace(model, **saved["model"]), checkpoint


def load_weights(role: Role, checkpoint: Checkpoint) -> None:
    """Start a role from a checkpoint: all of its weights, or the trunk below a fresh scalar head."""
    source = checkpoint.source_for(role.name)
    wanted = role.module.sharded_state_dict(prefix=f"{source}.")
    trunk_only = role.module.head == "scalar" and source == "actor"
    if trunk_only:
        wanted = {key: value for key, value in wanted.items() if not key.startswith(f"{source}.output_layer.")}
    # Under a key of its own: the checkpoint's unsharded content (optimizer settings) is returned beside it.
    loaded = dist_checkpointing.load({"wanted": wanted}, str(checkpoint.path / "weights"))["wanted"]
    role.module.load_state_dict(_without_prefix(loaded, source), strict=not trunk_only)
    role.reload_master_weights()


def load_training(roles: list[Role], checkpoint: Checkpoint) -> None:
    """Weights, optimizers and learning-rate schedules of every role, as `save` left them, in any layout."""
    loaded = dist_checkpointing.load(_sharded(roles, loading=True), str(checkpoint.path / "weights"))
    for role in roles:
        part = loaded[role.name]
        role.module.load_state_dict(_without_prefix(part["model"], role.name))
        if role.optimizer is not None:
            role.optimizer.load_state_dict(part["optimizer"])
            role.schedule.load_state_dict(part["schedule"])


def _sharded(roles: list[Role], loading: bool) -> dict:
    parts = {}
    for role in roles:
        model = role.module.sharded_state_dict(prefix=f"{role.name}.")
        parts[role.name] = {"model": model}
        if role.optimizer is not None:
            parts[role.name]["optimizer"] = role.optimizer.sharded_state_dict(
                model, is_loading=loading, metadata={"distrib_optim_sharding_type": "fully_reshardable"}
            )
            parts[role.name]["schedule"] = role.schedule.state_dict()
    return parts


def _without_prefix(weights: dict, name: str) -> dict:
    return {key.removeprefix(f"{name}."): value for key, value in weights.items()}


def _published(run: Path) -> list[Path]:
    return sorted(path for path in (run / "checkpoints").glob("step_*") if path.is_dir())


def _fingerprint(path: Path) -> dict:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return {"bytes": path.stat().st_size, "crc32": checksum}


def _over_ranks(paths: list[Path], read, runtime: Runtime) -> dict:
    """`read` of every path, the files dealt out over the ranks; all results on all ranks."""
    mine = {path: read(path) for path in paths[runtime.rank :: runtime.world_size]}
    parts: list = [None] * runtime.world_size
    dist.all_gather_object(parts, mine)
    return {path: found for part in parts for path, found in part.items()}


def _damage(path: Path, runtime: Runtime) -> str | None:
    """What is wrong with a checkpoint, naming the file; None when every file is as the manifest says."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        return f"{path / 'manifest.json'}: {error}"

    def compare(file: Path) -> str | None:
        expected = manifest[str(file.relative_to(path))]
        if not file.exists():
            return f"{file}: missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{file}: expected {expected['bytes']} bytes, found {file.stat().st_size}"
        return None if _fingerprint(file) == expected else f"{file}: checksum differs"

    problems = _over_ranks([path / name for name in sorted(manifest)], compare, runtime)
    return next((problem for problem in problems.values() if problem), None)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


