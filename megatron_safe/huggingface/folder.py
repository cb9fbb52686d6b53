"""A Hugging Face folder on disk: opened, checked, and read slice by slice.

The weights are one of, in the order in which `transformers` looks for them:

    model.safetensors                  one file
    model.safetensors.index.json       and the shards that its weight_map names
    pytorch_model.bin                  one file, a zip as torch.save writes it
    pytorch_model.bin.index.json       and the shards that its weight_map names

Safetensors are read here and not by the library: its slices come out of a mapping of the whole file, whose pages stay
resident until the file is closed, and a checkpoint read tensor by tensor would end up in memory as a whole. With the
header's offsets a slice is one plain read into a tensor of its own, and a damaged file is one line instead of a signal.
"""

import contextlib
import json
import math
import mmap
import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_safe.errors import UserError

DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The types of safetensors that are read and written, in the order in which the library lays them out in a file."""

_WHOLE = ("model.safetensors", "pytorch_model.bin")
_LONGEST_HEADER = 100_000_000  # the safetensors library's own limit
_BLOCK = 1 << 26  # bytes that a read may hold beyond its result
_LARGE = 1 << 22  # bytes from which on a result gets memory of its own kind
_LONGEST_SIDE_FILE = 100_000_000
# Weights in any framework's format, and other pickles (training_args.bin, optimizer.pt), which are never passed on.
_NO_SIDE_FILES = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".gguf", ".onnx", ".npz",
}  # fmt: skip
# Buffers that old versions of transformers saved and all versions compute: no part of the model.
_COMPUTED = re.compile(r"\.(rotary_emb\.inv_freq|masked_bias)$")


@dataclass(frozen=True)
class Entry:
    """Where a tensor is: `start` is the byte of `file` at which its rows begin, None in a .bin."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int | None


class Folder:
    """A Hugging Face folder whose weights have been found, and their headers read and checked; no tensor is held.

    Attributes:
        path: the folder.
        config: the content of config.json.
        entries: every tensor by name, in the order in which they lie in the files.
        index: the content of the index of shards, None where the weights are one file.

    Raises:
        UserError: no config.json, no weights, a missing or damaged file, an index that does not fit its shards, a
            type of tensor that is not read, or a .bin with anything in it but tensors (which is never unpickled).
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = _read_json(self.path / "config.json")
        self.entries: dict[str, Entry] = {}
        self.index: dict | None = None
        self._mapped: tuple[str, dict[str, torch.Tensor]] | None = None  # the .bin that was read last
        self._touched = 0  # bytes read through that mapping
        for file in self._find():
            for name, entry in self._read_header(file).items():
                if name in self.entries:
                    raise UserError(f"{self.path / file}: tensor {name!r} is in {self.entries[name].file} already")
                self.entries[name] = entry
        if self.index is not None:
            self._check_index()

    def _find(self) -> list[str]:
        """The files with the weights; sets `index`."""
        for whole in _WHOLE:
            if (self.path / whole).exists():
                return [whole]
            index = self.path / f"{whole}.index.json"
            if index.exists():
                return self._read_index(index)
        raise UserError(f"{self.path}: expected {', '.join(_WHOLE)} or an index of shards of one, found none")

    def _read_index(self, path: Path) -> list[str]:
        self.index = _read_json(path)
        places = self.index.get("weight_map")
        if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
            raise UserError(f"{path}: expected weight_map to name the file of each tensor, found {places!r:.80}")
        files = sorted(set(places.values()))
        suffix = path.name.split(".")[1]
        for file in files:
            # A name with folders in it could lead anywhere on this machine.
            if Path(file).name != file or not file.endswith(f".{suffix}"):
                raise UserError(f"{path}: expected the names of .{suffix} files beside it, found {file!r}")
            if not (self.path / file).exists():
                raise UserError(f"{self.path / file}: expected this shard, which {path.name} names; it is missing")
        return files

    def _check_index(self) -> None:
        places = self.index["weight_map"]
        for name, file in places.items():
            found = self.entries.get(name)
            if found is None or found.file != file:
                other = f", found it in {found.file}" if found else ", found no such tensor in it"
                raise UserError(f"{self.path / file}: expected tensor {name!r}, which the index places there{other}")
        for name, entry in self.entries.items():
            if name not in places and not _COMPUTED.search(name):
                raise UserError(f"{self.path / entry.file}: found tensor {name!r}, which the index does not name")

    def _read_header(self, file: str) -> dict[str, Entry]:
        path = self.path / file
        try:
            with path.open("rb") as handle:
                pointer = handle.read(24) == b"version https://git-lfs."
        except OSError as error:
            raise UserError(f"{path}: expected weights, found {error.strerror}") from error
        if pointer:
            raise UserError(f"{path}: expected weights, found a Git LFS pointer to them; `git lfs pull` fetches them")
        if file.endswith(".safetensors"):
            return _read_safetensors_header(path)
        tensors = _map_bin(path)
        return {name: Entry(file, value.dtype, tuple(value.shape), None) for name, value in tensors.items()}

    def check(self, expected: dict[str, tuple[int, ...]], optional: set[str] | frozenset[str] = frozenset()) -> None:
        """Whether the folder holds what an architecture needs. Buffers that are computed anyway are passed over.

        Args:
            expected: the shape of every tensor of the architecture.
            optional: names that may be missing, or present without being expected (then of any shape).

        Raises:
            UserError: the first tensor that is missing, of another shape, or unknown.
        """
        for name, shape in expected.items():
            entry = self.entries.get(name)
            if entry is None and name not in optional:
                raise UserError(f"{self.path}: expected tensor {name!r} of shape {list(shape)}, found no such tensor")
            if entry is not None and entry.shape != tuple(shape):
                file = self.path / entry.file
                raise UserError(f"{file}: tensor {name!r}: expected shape {list(shape)}, found {list(entry.shape)}")
        for name, entry in self.entries.items():
            if name not in expected and name not in optional and not _COMPUTED.search(name):
                file = self.path / entry.file
                raise UserError(f"{file}: found tensor {name!r}, which is no part of the architecture")

    def read(
        self, name: str, rows: tuple[int, int] | None = None, columns: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """One tensor or a part of it, as a contiguous CPU tensor of its own.

        At most 64 MiB (or one row, where that is more) are held beyond the result. Of a column slice whole rows are
        read: a row's slice is rarely longer than a page, so that no other way would spare the disk anything.

        Args:
            rows: [start, stop) of the first dimension; all by default.
            columns: [start, stop) of the second dimension of a matrix; all by default.

        Raises:
            UserError: the file has become shorter since it was opened.
            ValueError: a slice outside of the tensor.
        """
        entry = self.entries[name]
        height, *row = entry.shape or (1,)
        first, last = rows or (0, height)
        left, right = columns or (0, row[0] if row else 0)
        if not 0 <= first <= last <= height or (rows is not None and not entry.shape):
            raise ValueError(f"rows {rows} of {name}, which is {list(entry.shape)}")
        if columns is not None and (len(row) != 1 or not 0 <= left <= right <= row[0]):
            raise ValueError(f"columns {columns} of {name}, which is {list(entry.shape)}")
        width = row if columns is None else [right - left]
        result = _empty((last - first, *width), entry.dtype)
        row_bytes = math.prod(row) * entry.dtype.itemsize
        step = max(1, _BLOCK // max(1, row_bytes))
        for start in range(first, last, step):
            stop = min(start + step, last)
            target = result[start - first : stop - first]
            if entry.start is None:
                mapped = self._map(entry.file, (stop - start) * row_bytes)[name].detach()
                block = torch.atleast_1d(mapped)[start:stop]
                target.copy_(block if columns is None else block[:, left:right])
            elif columns is None:
                self._fill(target, entry, start * row_bytes)
            else:
                block = torch.empty((stop - start, *row), dtype=entry.dtype)
                self._fill(block, entry, start * row_bytes)
                target.copy_(block[:, left:right])
        return result.reshape(()) if not entry.shape else result

    def _fill(self, target: torch.Tensor, entry: Entry, offset: int) -> None:
        view = memoryview(target.reshape(-1).view(torch.uint8).numpy())
        with (self.path / entry.file).open("rb", buffering=0) as handle:
            handle.seek(entry.start + offset)
            while view:
                count = handle.readinto(view)  # Linux stops a read at 2 GiB
                if count == 0:
                    raise UserError(f"{self.path / entry.file}: expected {len(view)} more bytes, found its end")
                view = view[count:]

    def _map(self, file: str, size: int) -> dict[str, torch.Tensor]:
        """The tensors of a .bin, mapped. A new mapping now and then lets go of the pages that were read."""
        self._touched += size
        if self._mapped is None or self._mapped[0] != file or self._touched > _BLOCK:
            self._mapped, self._touched = None, size
            self._mapped = (file, _map_bin(self.path / file))
        return self._mapped[1]

    def side_files(self) -> list[Path]:
        """What belongs to the model and is not weights: config.json, the tokenizer's files, templates, licences.

        Regular files of the folder itself, sorted by name; hidden ones, pickles, and any of 100 MB or more left out.
        """
        return [
            path
            for path in sorted(self.path.iterdir())
            if path.is_file()
            and path.suffix not in _NO_SIDE_FILES
            and not path.name.startswith(".")
            and not path.name.endswith(".index.json")
            and path.stat().st_size < _LONGEST_SIDE_FILE
        ]

    def record(self) -> dict:
        """Which tensor was where, in JSON's types: what `shards.plan_as_recorded` needs to lay them out the same way.

        {"tensors": {name: [file, type as in DTYPES]}, "index": the index but for its weight_map, or None}. Buffers
        that are computed anyway are left out, here and in the index's total_size.
        """
        names = {dtype: name for name, dtype in DTYPES.items()}
        index, dropped = self.index, 0
        tensors = {}
        for name, entry in self.entries.items():
            if _COMPUTED.search(name):
                dropped += math.prod(entry.shape) * entry.dtype.itemsize
            else:
                tensors[name] = [entry.file, names[entry.dtype]]
        if index is not None:
            rest = {key: value for key, value in index.items() if key != "weight_map"}
            index = resized(rest, -dropped)
        return {"tensors": tensors, "index": index}


def is_huggingface(path: str | Path) -> bool:
    """Whether a folder is a Hugging Face model, and not a run or a checkpoint of ours."""
    path = Path(path)
    ours = any((path / name).exists() for name in ("state.json", "manifest.json", "checkpoints"))
    return (path / "config.json").is_file() and not ours


def resized(index: dict, change: int) -> dict:
    """An index whose metadata.total_size, where it has one, is larger by `change` bytes."""
    metadata = index.get("metadata")
    if not change or not isinstance(metadata, dict) or not isinstance(metadata.get("total_size"), int | float):
        return index
    return index | {"metadata": metadata | {"total_size": metadata["total_size"] + change}}


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """torch.empty, in huge pages: to touch fresh memory 4 KiB at a time takes longer than to read a file into it."""
    size = math.prod(shape) * dtype.itemsize
    if size < _LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).reshape(shape)


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected a JSON object, found {_reason(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {content!r:.80}")
    return content


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or repr(error)
    return (str(error) or repr(error)).splitlines()[0]


def _read_safetensors_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file, in the order of their data, which must fill the file without a gap."""
    size = path.stat().st_size
    with path.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise UserError(
                f"{path}: expected a safetensors file, found {size} bytes, the first of which speak of a header "
                f"of {length}; it is cut short or something else"
            )
        header = handle.read(length)
    try:
        content = json.loads(header.decode("utf-8"), object_pairs_hook=_unique)
        tensors = {name: value for name, value in content.items() if name != "__metadata__"}
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: expected a header in JSON, found {_reason(error)}") from error
    for name, value in tensors.items():
        if not _well_formed(value):
            raise UserError(f"{path}: tensor {name!r}: expected dtype, shape and data_offsets, found {value!r:.80}")
        if value["dtype"] not in DTYPES:
            raise UserError(f"{path}: tensor {name!r}: expected one of {', '.join(DTYPES)}, found {value['dtype']!r}")
    entries, position = {}, 0
    for name, value in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (begin, end) = DTYPES[value["dtype"]], tuple(value["shape"]), value["data_offsets"]
        wanted = (position, position + math.prod(shape) * dtype.itemsize)
        if (begin, end) != wanted:
            raise UserError(f"{path}: tensor {name!r}: expected data_offsets {list(wanted)}, found {[begin, end]}")
        entries[name] = Entry(path.name, dtype, shape, 8 + length + begin)
        position = end
    if 8 + length + position != size:
        raise UserError(f"{path}: expected {8 + length + position} bytes, as its header says, found {size}")
    return entries


def _unique(pairs: list[tuple]) -> dict:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name twice")
    return content


def _well_formed(value) -> bool:
    def numbers(found) -> bool:
        return isinstance(found, list) and all(type(number) is int and number >= 0 for number in found)

    return (
        isinstance(value, dict)
        and isinstance(value.get("dtype"), str)
        and numbers(value.get("shape"))
        and numbers(value.get("data_offsets"))
        and len(value["data_offsets"]) == 2
    )


def _map_bin(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .bin, mapped: their pages are read when they are touched."""
    # A file that is cut short has lost its directory, which is at the end; before torch 1.6 there was none.
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: expected a zip as torch.save writes it, found none: cut short, or before torch 1.6")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        found = f"the global {code[1]}" if code else "something else"
        raise UserError(f"{path}: expected nothing but tensors, found {found}; refusing to load it") from error
    except Exception as error:  # a garbled pickle fails in any way
        raise UserError(f"{path}: expected tensors as torch.save writes them, found: {_reason(error):.200}") from error
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: expected a dictionary of tensors, found {type(content).__name__}")
    supported = DTYPES.values()
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise UserError(f"{path}: expected tensors by name, found {type(value).__name__} {name!r}")
        if value.dtype not in supported or value.layout != torch.strided or value.device.type != "cpu":
            raise UserError(
                f"{path}: tensor {name!r}: expected a dense one of {', '.join(map(_short, supported))}, "
                f"found {_short(value.dtype)}, {_short(value.layout)}, on {value.device.type}"
            )
    return content


def _short(kind: torch.dtype | torch.layout) -> str:
    return str(kind).removeprefix("torch.")
