"""A Hugging Face folder becomes a run folder with one checkpoint, tensor by tensor.

    OUT/checkpoints/step_00000000/
        weights/                        the role `actor` (a language model) or `score` (a scalar head), for any layout
        state.json, manifest.json       as in every checkpoint
        huggingface/ROLE/               what the folder holds beside weights, and weights.json: what was where

A few rows are read while those before are on their way to the disk: no tensor is ever held as a whole.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_safe.checkpoint_format import fingerprint, write_manifest, write_state
from megatron_safe.errors import UserError
from megatron_safe.huggingface.distcp import Writer
from megatron_safe.huggingface.folder import Folder
from megatron_safe.huggingface.layout import Stored, stored_tensors
from megatron_safe.huggingface.loading import HuggingFaceModel
from megatron_safe.huggingface.staging import check_unused, staged
from megatron_safe.models.llama import architecture

_BLOCK = 1 << 20  # bytes that are read at a time
_LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


@dataclass(frozen=True)
class Import:
    """A folder that has been checked, and the type of each tensor of ours; nothing is written yet."""

    model: HuggingFaceModel
    types: dict[str, torch.dtype]

    @staticmethod
    def of(path: Path, dtype: torch.dtype | None = None) -> "Import":
        """Args: dtype: of all weights; by default their own, and for one that is made of several, the widest.

        Raises:
            UserError: as `HuggingFaceModel.open`, or a weight that is not floating point.
        """
        model = HuggingFaceModel.open(path)
        types: dict[str, torch.dtype] = {}
        for stored in stored_tensors(model.description):
            for piece in stored.pieces:
                kind = model.folder.entries[piece.name].dtype
                if not kind.is_floating_point:
                    raise UserError(f"{path}: tensor {piece.name!r}: expected floating point, found {short_name(kind)}")
            # One type for a tensor of all layers. Widening is exact, and so is the way back.
            widest = _widest(model.folder, stored)
            types[stored.key] = dtype or torch.promote_types(types.get(stored.key, widest), widest)
        return Import(model, types)

    @property
    def role(self) -> str:
        (role,) = self.model.roles
        return role

    @property
    def total_bytes(self) -> int:
        """Bytes of our tensors."""
        stored = stored_tensors(self.model.description)
        return sum(math.prod(each.shape) * self.types[each.key].itemsize for each in stored)

    def check_output(self, out: Path) -> None:
        """Raises UserError where `write` would not begin."""
        check_unused(out, self.total_bytes)

    def write(self, out: Path, progress: Callable[[int], None] = lambda done: None) -> None:
        """Write the run folder, whole or not at all.

        Args:
            out: new or empty.
            progress: called after each tensor with its bytes; they add up to `total_bytes`.

        Raises:
            UserError: `out` is in use, the disk is full, the folder changed while it was read, or a number is too
                large for fp16.
        """
        with staged(out, self.total_bytes) as hidden:
            checkpoint = hidden / "checkpoints" / "step_00000000"
            (checkpoint / "weights").mkdir(parents=True)
            with Writer(checkpoint / "weights") as writer:
                for stored in stored_tensors(self.model.description):
                    self._write(stored, writer)
                    progress(math.prod(stored.shape) * self.types[stored.key].itemsize)
                self._write_states(writer)
            self.model.origin.write(checkpoint, self.role)
            description = self.model.description
            write_state(checkpoint, 0, 0, {self.role: (architecture(description.model), description.vocab_size)}, {})
            sums = {f"weights/{name}": found for name, found in writer.sums.items()}
            for path in sorted(checkpoint.rglob("*")):
                name = str(path.relative_to(checkpoint))
                if path.is_file() and name not in sums:
                    sums[name] = fingerprint(path)
            write_manifest(checkpoint, sums)

    def _write(self, stored: Stored, writer: Writer) -> None:
        layers = () if stored.layer is None else (self.model.description.model.num_layers,)
        offsets = (*(() if stored.layer is None else (stored.layer,)), *[0] * len(stored.shape))
        dtype = self.types[stored.key]
        writer.add(
            f"{self.role}.{stored.key}", (*layers, *stored.shape), offsets, (*[1] * len(layers), *stored.shape), dtype,
            _blocks(self.model.folder, stored, dtype),
        )  # fmt: skip

    def _write_states(self, writer: Writer) -> None:
        count = self.model.description.model.num_layers
        for layer in range(count):
            for name in _LINEARS:
                writer.add_nothing(f"{self.role}.decoder.layers.{name}._extra_state/shard_{layer}_{count}")


def _blocks(folder: Folder, stored: Stored, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The rows of a tensor of ours in order, some at a time."""
    row = stored.shape[1:]
    step = max(1, _BLOCK // (dtype.itemsize * math.prod(row)))
    end = 0
    for piece in stored.pieces:  # which lie one after the other from row 0 on
        for start in range(piece.start, piece.stop, step):
            rows = (start, min(start + step, piece.stop))
            yield narrowed(folder.read(piece.name, rows), dtype, piece.name)
        end = piece.at + piece.stop - piece.start
    for start in range(end, stored.shape[0], step):  # the vocabulary's padding
        yield torch.zeros(min(step, stored.shape[0] - start), *row, dtype=dtype)


def _widest(folder: Folder, stored: Stored) -> torch.dtype:
    return functools.reduce(torch.promote_types, (folder.entries[piece.name].dtype for piece in stored.pieces))


def narrowed(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """In another type. Raises UserError where a number of it is too large for that."""
    if tensor.dtype == dtype:
        return tensor
    result = tensor.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max and not torch.equal(result.isfinite(), tensor.isfinite()):
        raise UserError(f"{name}: expected numbers that fit {short_name(dtype)}, found up to {tensor.abs().max():.4g}")
    return result


def short_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
