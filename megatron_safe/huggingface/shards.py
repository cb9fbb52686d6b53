"""Safetensors files, written tensor by tensor: which file each goes to, the index, and the streaming writer.

A header needs types, shapes and order, and no data: it is written first, and each tensor's bytes follow as the tensor
is produced, so that no more than one is ever held. The files are those of the safetensors library to the byte.
"""

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from megatron_safe.errors import UserError
from megatron_safe.huggingface.folder import DTYPES, resized

Tensors = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Type and shape of each tensor by name."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class Plan:
    """The files to write, each with its tensors in the order in which they lie in it; the index, where there is one."""

    files: dict[str, Tensors]
    index: dict | None

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, headers and index not counted."""
        return sum(_bytes(spec) for tensors in self.files.values() for spec in tensors.values())


def parse_size(text: str | int) -> int:
    """Bytes in "5GB", "200 MB", "1.5gb" (powers of 1000, as `transformers` has it) or a plain number.

    Raises:
        UserError: anything else, or less than one byte.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]B|)\s*", str(text), re.IGNORECASE | re.ASCII)
    size = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if size < 1:
        raise UserError(f"max-shard-size: expected bytes, such as 5GB or 200MB, found {text!r}")
    return size


def plan_by_size(tensors: Tensors, max_shard_size: str | int = "5GB") -> Plan:
    """The files that `transformers`' save_pretrained would write.

    Args:
        tensors: in the model's order, which decides what goes together.
        max_shard_size: bytes of tensors in a file, see `parse_size`; a larger tensor gets a file of its own.
    """
    limit = parse_size(max_shard_size)
    shards: list[Tensors] = []
    shard: Tensors = {}
    size = 0
    for name, spec in tensors.items():
        if _bytes(spec) > limit:  # before the shard that is being filled, which goes on after it
            shards.append({name: spec})
            continue
        if size + _bytes(spec) > limit:
            shards.append(shard)
            shard, size = {}, 0
        shard[name] = spec
        size += _bytes(spec)
    if shard:
        shards.append(shard)
    if len(shards) == 1:
        return Plan({"model.safetensors": _laid_out(shards[0])}, None)
    files = {f"model-{i:05d}-of-{len(shards):05d}.safetensors": _laid_out(shard) for i, shard in enumerate(shards, 1)}
    index = {
        "metadata": {
            "total_parameters": sum(math.prod(shape) for _, shape in tensors.values()),
            "total_size": sum(map(_bytes, tensors.values())),
        },
        "weight_map": {name: file for file, shard in files.items() for name in shard},
    }
    return Plan(files, index)


def plan_as_recorded(record: dict, tensors: Tensors) -> Plan:
    """The files of the folder that a model was imported from; what was a .bin there becomes a .safetensors.

    The index is the recorded one; its total_size follows where types have changed since.

    Args:
        record: what `Folder.record` gave.
        tensors: the same tensors by name, of any type.

    Raises:
        UserError: the record is no such thing, or names other tensors.
    """
    where = "the checkpoint's record of its Hugging Face folder"
    try:
        recorded = {name: (str(file), DTYPES[kind]) for name, (file, kind) in record["tensors"].items()}
        index = None if record["index"] is None else dict(record["index"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: expected file and type of each tensor and an index, found {error!r}") from error
    if other := sorted(recorded.keys() ^ tensors.keys()):
        known = "only there" if other[0] in recorded else "not there"
        raise UserError(f"{where}: expected the model's {len(tensors)} tensors, found {other[0]!r} {known}")
    files: dict[str, Tensors] = {}
    for name, (file, _) in recorded.items():
        # Records travel with checkpoints: a name must not lead out of the new folder, or to one of its other files.
        if Path(file).name != file or Path(file).suffix not in (".safetensors", ".bin"):
            raise UserError(f"{where}: expected the name of a .safetensors or .bin file, found {file!r}")
        if file.endswith(".bin"):
            file = file.removesuffix(".bin").replace("pytorch_model", "model", 1) + ".safetensors"
        files.setdefault(file, {})[name] = tensors[name]
    if index is not None:
        change = sum(_bytes(tensors[name]) - _bytes((kind, tensors[name][1])) for name, (_, kind) in recorded.items())
        places = {name: file for file, shard in files.items() for name in shard}
        index = resized(index, change) | {"weight_map": places}
    return Plan({file: _laid_out(shard) for file, shard in files.items()}, index)


def write_shards(
    out: Path, plan: Plan, read: Callable[[str], torch.Tensor], progress: Callable[[int], None] | None = None
) -> None:
    """Write the files of a plan into a folder, and see them onto the disk.

    Args:
        out: an existing folder without files of these names.
        read: the tensor of a name, of the planned type and shape. It is called once for each, file by file in the
            plan's order (within a type by name, so that a layer's tensors follow each other), and its result is let
            go before the next call.
        progress: called after each tensor with its bytes; they add up to `plan.total_bytes`.

    Raises:
        OSError: the disk is full, or as `read` has it. What was written until then stays, for the caller to remove.
        ValueError: `read` gave another type or shape than planned.
    """
    for file, tensors in plan.files.items():
        with (out / file).open("xb") as handle:
            handle.write(_header(tensors))
            for name, spec in tensors.items():
                _write(handle, name, read(name), spec)  # not named here: it would outlive the next call of `read`
                if progress is not None:
                    progress(_bytes(spec))
            _sync(handle)
    if plan.index is not None:
        text = json.dumps(plan.index, indent=2, sort_keys=True) + "\n"
        with (out / "model.safetensors.index.json").open("xb") as handle:
            handle.write(text.encode())
            _sync(handle)


def _bytes(spec: tuple[torch.dtype, tuple[int, ...]]) -> int:
    dtype, shape = spec
    return math.prod(shape) * dtype.itemsize


def _laid_out(tensors: Tensors) -> Tensors:
    """In the library's order within a file: wide types first, so that all data are aligned, then by name."""
    return dict(sorted(tensors.items(), key=lambda item: (_RANKS[item[1][0]], item[0])))


def _header(tensors: Tensors) -> bytes:
    content: dict = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, spec in tensors.items():
        end = position + _bytes(spec)
        content[name] = {"dtype": _NAMES[spec[0]], "shape": list(spec[1]), "data_offsets": [position, end]}
        position = end
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write(handle: BinaryIO, name: str, tensor: torch.Tensor, spec: tuple[torch.dtype, tuple[int, ...]]) -> None:
    if (tensor.dtype, tuple(tensor.shape)) != spec:
        raise ValueError(f"{name}: planned {spec}, found {(tensor.dtype, tuple(tensor.shape))}")
    handle.write(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))


def _sync(handle: BinaryIO) -> None:
    handle.flush()
    os.fsync(handle.fileno())
