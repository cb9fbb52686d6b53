"""What is on disk: weights and optimizers through dist_checkpointing, the rest as JSON.

    RUN/checkpoints/step_00000120/
        weights/        every saved role, sharded; loads in any layout
        state.json      step, architectures, and the loop's own state (λ and its cost window, ...)
        huggingface/    for each role whose model came from Hugging Face: what it brought beside weights
        manifest.json   size and CRC-32 of every file

A checkpoint is written under a hidden name and published by one rename, so a name that can be seen is whole; the
manifest finds what was damaged later, and `pickles` sees to it that loading one runs no code. No generator state is
stored because none is used: data order and sampling are functions of the seed, the step and the sample.
"""

import os
import pickle
import shutil
from collections.abc import Collection
from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from megatron_safe.checkpoint_format import Checkpoint, fingerprint, read_manifest, write_manifest, write_state
from megatron_safe.errors import UserError, first_line
from megatron_safe.huggingface.staging import sync
from megatron_safe.models.llama import architecture
from megatron_safe.models.roles import Role
from megatron_safe.runtime import Runtime
from megatron_safe.training import pickles

# A role may start from its own weights or from those that come before it in the paper's order of stages. A published
# scoring model is a `score`, whatever it was trained to judge.
_SOURCES = {
    "actor": ("actor",),
    "reference": ("actor",),
    "reward_model": ("reward_model", "score", "actor"),
    "cost_model": ("cost_model", "score", "actor"),
    "reward_critic": ("reward_critic", "reward_model", "score"),
    "cost_critic": ("cost_critic", "cost_model", "score"),
    "critic": ("critic", "reward_model", "score"),
}


def source_for(role: str, available: Collection[str], where: Path) -> str:
    """Which of the available roles `role` starts from. Raises UserError where there is none."""
    for name in _SOURCES[role]:
        if name in available:
            return name
    wanted = " or ".join(_SOURCES[role])
    raise UserError(f"{where}: expected {wanted} to start {role} from, found {', '.join(available)}")


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

    def prepare() -> None:
        for leftover in folder.glob(".step_*.tmp"):  # of a process that died while it saved
            shutil.rmtree(leftover)
        (hidden / "weights").mkdir(parents=True)

    def describe() -> None:
        saved = {role.name: (architecture(role.model), role.vocab_size) for role in roles}
        write_state(hidden, step, seed, saved, state)
        for role in roles:
            if role.origin is not None:
                role.origin.write(hidden, role.name)

    def publish() -> None:
        write_manifest(hidden, {str(path.relative_to(hidden)): found for path, found in sums.items()})
        for path in hidden.rglob("*"):
            sync(path)
        # Checkpoints from this step on are damaged ones that a resume has passed over: they must not outlive it, nor
        # take a good one's place among the newest.
        for path in _published(run):
            if path.name >= final.name:
                shutil.rmtree(path)
        os.rename(hidden, final)
        sync(folder)
        for old in _published(run)[:-keep_last] if keep_last > 0 else []:
            shutil.rmtree(old)

    sharded = _sharded(roles, loading=False)
    runtime.on_main(prepare)
    try:
        dist_checkpointing.save(sharded, str(hidden / "weights"))
    except CheckpointException as error:  # on every rank, where any could not write; only rank 0 knows why
        causes = "; ".join(f"rank {rank}: {cause[0]}" for rank, cause in error.failures.items())
        raise OSError(f"{final}: the weights could not be written: {causes or 'see rank 0'}") from error
    runtime.on_main(describe)
    sums = _over_ranks(sorted(path for path in hidden.rglob("*") if path.is_file()), fingerprint, runtime)
    runtime.on_main(publish)
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
            try:
                return Checkpoint.read(candidate)
            except UserError as error:
                problem = str(error)
        problems.append(problem)
        runtime.print(f"warning: checkpoint is damaged, using the one before: {problem}")
    if problems:
        raise UserError(f"{path}: no good checkpoint is left: {problems[0]}")
    raise UserError(f"{path}: expected a checkpoint or a run folder with one in checkpoints/, found none")


def has_checkpoints(run: Path) -> bool:
    return bool(_published(run))


def load_weights(role: Role, checkpoint: Checkpoint) -> None:
    """Start a role from a checkpoint: all of its weights, or the trunk below a fresh scalar head."""
    source = source_for(role.name, checkpoint.roles, checkpoint.path)
    wanted = _weights(role, source)
    trunk_only = role.module.head == "scalar" and source == "actor"
    if trunk_only:
        for chunk in wanted.values():
            for key in [key for key in chunk if key.startswith(f"{source}.output_layer.")]:
                del chunk[key]
    # Under a key of its own: the checkpoint's unsharded content (optimizer settings) is returned beside it.
    loaded = _load({"wanted": wanted}, checkpoint)["wanted"]
    _load_weights(role, loaded, source, strict=not trunk_only)
    role.reload_master_weights()


def load_training(roles: list[Role], checkpoint: Checkpoint) -> None:
    """Weights, optimizers and learning-rate schedules of every role, as `save` left them, in any layout."""
    loaded = _load(_sharded(roles, loading=True), checkpoint)
    for role in roles:
        part = loaded[role.name]
        _load_weights(role, part["model"], role.name)
        if role.optimizer is not None:
            role.load_optimizer(part["optimizer"], part["schedule"])


def _load(sharded: dict, checkpoint: Checkpoint) -> dict:
    weights = checkpoint.path / "weights"
    pickles.check_index(weights / ".metadata")
    pickles.read_objects_safely()
    try:
        return dist_checkpointing.load(sharded, str(weights))
    except pickle.UnpicklingError as error:
        raise UserError(f"{weights}: expected tensors and plain data, found: {first_line(error)}") from error
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        raise UserError(f"{weights}: expected tensors and plain data, found: {first_line(causes[0])}") from error


def _sharded(roles: list[Role], loading: bool) -> dict:
    parts = {}
    for role in roles:
        model = _weights(role, role.name)
        parts[role.name] = {"model": model}
        if role.optimizer is not None:
            parts[role.name]["optimizer"] = role.optimizer.sharded_state_dict(
                model, is_loading=loading, metadata={"distrib_optim_sharding_type": "fully_reshardable"}
            )
            parts[role.name]["schedule"] = role.schedule.state_dict()
    return parts


def _weights(role: Role, name: str) -> dict[str, dict]:
    """What is to be saved or loaded under `name`, by chunk: each counts its layers from 0, their keys all of them."""
    return {str(i): chunk.sharded_state_dict(prefix=f"{name}.") for i, chunk in enumerate(role.chunks)}


def _load_weights(role: Role, loaded: dict[str, dict], name: str, strict: bool = True) -> None:
    for i, chunk in enumerate(role.chunks):
        weights = {key.removeprefix(f"{name}."): value for key, value in loaded[str(i)].items()}
        chunk.load_state_dict(weights, strict=strict)


def _published(run: Path) -> list[Path]:
    return sorted(path for path in (run / "checkpoints").glob("step_*") if path.is_dir())


def _over_ranks(paths: list[Path], read, runtime: Runtime) -> dict:
    """`read` of every path, the files dealt out over the ranks; all results on all ranks."""
    mine = {path: read(path) for path in paths[runtime.rank :: runtime.world_size]}
    parts: list = [None] * runtime.world_size
    dist.all_gather_object(parts, mine)
    return {path: found for part in parts for path, found in part.items()}


def _damage(path: Path, runtime: Runtime) -> str | None:
    """What is wrong with a checkpoint, naming the file; None when every file is as the manifest says."""
    try:
        manifest = read_manifest(path)
    except UserError as error:
        return str(error)
    expected = {path / name: found for name, found in manifest.items()}
    for name in ("state.json", "weights/.metadata"):
        if path / name not in expected:
            return f"{path / 'manifest.json'}: expected {name} to be listed, found {', '.join(manifest) or 'nothing'}"

    def compare(file: Path) -> str | None:
        size, checksum = expected[file]["bytes"], expected[file]["crc32"]
        if not file.is_file():
            return f"{file}: missing"
        if file.stat().st_size != size:
            return f"{file}: expected {size} bytes, found {file.stat().st_size}"
        return None if fingerprint(file)["crc32"] == checksum else f"{file}: checksum differs"

    problems = _over_ranks(sorted(expected), compare, runtime)
    return next((problem for problem in problems.values() if problem), None)
