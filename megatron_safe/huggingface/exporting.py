"""A role of a checkpoint becomes a Hugging Face folder, tensor by tensor.

What came from Hugging Face leaves as it came: the same names, types, files and index, and every side file to the byte.
A model that never did gets a `config.json` of its own, and the tokenizer that it was trained with.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_safe.config import ModelConfig
from megatron_safe.errors import UserError
from megatron_safe.huggingface import shards
from megatron_safe.huggingface.carried import carried
from megatron_safe.huggingface.distcp import Reader
from megatron_safe.huggingface.families import Description, describe, new_config, normalizer_of
from megatron_safe.huggingface.folder import DTYPES
from megatron_safe.huggingface.importing import narrowed, short_name
from megatron_safe.huggingface.layout import (
    Piece,
    Stored,
    huggingface_tensors,
    optional_tensors,
    stored_tensors,
)
from megatron_safe.huggingface.origin import Origin
from megatron_safe.huggingface.staging import check_unused, staged
from megatron_safe.huggingface.tokenizer_files import TokenizerFiles
from megatron_safe.models.llama import Head, architecture
from megatron_safe.models.roles import HEADS, VALUES

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# What makes a language model's config.json one of a scoring model.
_SCORE_FIELDS = (
    "architectures", "score_dim", "score_bias", "score_type", "do_normalize", "normalizer_type", "mean", "var",
    "id2label", "label2id",
)  # fmt: skip
_SCORE_TYPES = {"cost_model": "cost", "reward_critic": "critic", "cost_critic": "critic"}


def head_of(role: str) -> Head:
    """Of a role in a checkpoint; `score` is that of an imported scoring model."""
    return "scalar" if role == "score" else HEADS[role]


def describe_role(checkpoint: Path, role: str, saved: dict) -> Description:
    """What a Hugging Face folder of a role would hold, by the config.json that it came with, or by a new one.

    Args:
        saved: the role in the checkpoint's state.json.

    Raises:
        UserError: the state is not one of ours, or no Hugging Face architecture is this model.
    """
    origin = Origin.of_checkpoint(checkpoint, role)
    return _new(checkpoint, role, saved) if origin is None else _as_it_came(origin, checkpoint, role, saved)


def _new(
    checkpoint: Path, role: str, saved: dict, dtype: torch.dtype = torch.float32, special_ids: dict | None = None
) -> Description:
    model, vocab_size = _model(checkpoint, role, saved)
    head = head_of(role)
    kind = None if head == "language" else "score" if _needs_score(model) else "sequence-classification"
    config = new_config(model, head, vocab_size, kind, short_name(dtype), special_ids or {})
    if kind == "score" and not config.get("do_normalize"):
        config["score_type"] = _SCORE_TYPES.get(role, "reward")
    return dataclasses.replace(describe(config, checkpoint / "state.json"), model=model)


def _as_it_came(origin: Origin, checkpoint: Path, role: str, saved: dict) -> Description:
    model, vocab_size = _model(checkpoint, role, saved)
    where = checkpoint / "huggingface" / role / "config.json"
    description = describe(origin.config, where)
    if description.head != head_of(role):  # a language model's trunk below a scalar head
        new = _new(checkpoint, role, saved).config
        config = origin.config | {key: new[key] for key in _SCORE_FIELDS if key in new}
        description = describe(config, where)
    ours = architecture(model) | {"vocab_size": vocab_size}
    theirs = architecture(description.model) | {"vocab_size": description.vocab_size}
    for key in ours.keys() - {"vocab_multiple", "score_mean", "score_std"}:
        if ours[key] != theirs[key]:
            raise UserError(f"{where}: expected {key} {ours[key]}, as state.json has it, found {theirs[key]}")
    return dataclasses.replace(description, model=model)


def _model(checkpoint: Path, role: str, saved: dict) -> tuple[ModelConfig, int]:
    if len(VALUES.get(role, ())) > 1:
        raise UserError(
            f"{checkpoint}: {role}: expected one output, found two, the values of reward and cost, which no published "
            "class holds; to export critics, train with `critics: separate`"
        )
    try:
        return ModelConfig(**saved["model"]), int(saved["vocab_size"])
    except (KeyError, TypeError, ValueError) as error:
        where = checkpoint / "state.json"
        raise UserError(f"{where}: expected the architecture of {role}, found {error!r}") from error


def _needs_score(model: ModelConfig) -> bool:
    """A head that only safe-rlhf's classes can hold."""
    return model.score_bias or (model.score_mean, model.score_std) != (0.0, 1.0)


@dataclass(frozen=True)
class Export:
    """A role whose every tensor has a name, a type and a place in the new folder; nothing is written yet.

    files: side files by name: one to copy, or the content of one.
    """

    checkpoint: Path
    role: str
    description: Description
    plan: shards.Plan
    files: dict[str, Path | str | bytes]
    reader: Reader
    extra: dict[str, torch.Tensor]

    @staticmethod
    def of(
        checkpoint: Path,
        role: str,
        saved: dict,
        dtype: torch.dtype | None = None,
        max_shard_size: str | int | None = None,
        tokenizer: Path | None = None,
        template: str = "plain",
    ) -> "Export":
        """
        Args:
            checkpoint: one that `training.checkpoint.find` has checked.
            role: one of its roles.
            saved: that role in its state.json.
            dtype: of all weights; by default their own in the folder they came from, else as they are stored.
            max_shard_size: as in `shards.parse_size`; by default the files are laid out as they came, else 5GB.
            tokenizer: folder or file; replaces the one that the model came with. Needed where it came with none.
            template: what the tokenizer was used with: "chat" decides what ends an answer.

        Raises:
            UserError: the checkpoint cannot be read or lacks a tensor, or no Hugging Face architecture is this model.
        """
        origin = Origin.of_checkpoint(checkpoint, role)
        reader = Reader(checkpoint / "weights")
        files: dict[str, Path | str | bytes] = {}
        given = TokenizerFiles.of(tokenizer, template) if tokenizer is not None else None
        stored_dtype = reader.dtype(f"{role}.embedding.word_embeddings.weight")
        if origin is None:
            if given is None:
                raise UserError(f"{checkpoint}: {role} came with no tokenizer; name the one it was trained with")
            description = _new(checkpoint, role, saved, dtype or stored_dtype, given.special_ids)
            files["config.json"] = _json(description.config)
            if description.head == "language":
                files["generation_config.json"] = _json(given.generation_ids)
            record: dict = {"tensors": {}}
        else:
            description = _as_it_came(origin, checkpoint, role, saved)
            record = origin.record
            files |= origin.files
            changed = _with_dtype(description.config, dtype)
            if changed != origin.config:
                files["config.json"] = _json(changed)
        if given is not None:
            files |= given.files
        extra = _extra(description, carried(record))
        plan = _plan(description, role, reader, extra, record, dtype, max_shard_size)
        return Export(checkpoint, role, description, plan, files, reader, extra)

    def check_output(self, out: Path) -> None:
        """Raises UserError where `write` would not begin."""
        check_unused(out, self.plan.total_bytes)

    def write(self, out: Path, progress: Callable[[int], None] = lambda done: None) -> None:
        """Write the folder, whole or not at all.

        Args:
            out: new or empty.
            progress: called after each tensor with its bytes; they add up to `plan.total_bytes`.

        Raises:
            UserError: `out` is in use, the disk is full, the checkpoint cannot be read, or a number is too large for
                its type.
        """
        types = {name: spec[0] for tensors in self.plan.files.values() for name, spec in tensors.items()}
        weights = _Weights(self.reader, self.role, self.description)

        def read(name: str) -> torch.Tensor:
            tensor = self.extra[name] if name in self.extra else weights.read(name)
            return narrowed(tensor, types[name], name)

        with staged(out, self.plan.total_bytes) as hidden:
            for name, content in self.files.items():
                if isinstance(content, Path):
                    shutil.copyfile(content, hidden / name)
                else:
                    (hidden / name).write_bytes(content if isinstance(content, bytes) else content.encode())
            shards.write_shards(hidden, self.plan, read, progress)


def _with_dtype(config: dict, dtype: torch.dtype | None) -> dict:
    if dtype is None:
        return config
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    return config | dict.fromkeys(keys, short_name(dtype))


def _extra(description: Description, found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of the folder that our model holds as numbers, or not at all."""
    if description.normalizer and "normalizer.mean" not in found:
        numbers = dict(zip(("normalizer.mean", "normalizer.var"), normalizer_of(description.model), strict=True))
        return found | {name: torch.tensor([number]) for name, number in numbers.items()}
    return found


def _plan(
    description: Description,
    role: str,
    reader: Reader,
    extra: dict[str, torch.Tensor],
    record: dict,
    dtype: torch.dtype | None,
    max_shard_size: str | int | None,
) -> shards.Plan:
    """Type, shape and file of every tensor, after a look whether the checkpoint has them all."""
    stored_types = {}
    layers = description.model.num_layers
    for stored in stored_tensors(description):
        key = f"{role}.{stored.key}"
        reader.check(key, stored.shape if stored.layer is None else (layers, *stored.shape))
        stored_types |= {piece.name: reader.dtype(key) for piece in stored.pieces}
    stored_types |= {name: tensor.dtype for name, tensor in extra.items()}
    recorded = record["tensors"]
    shapes = huggingface_tensors(description)
    if _HEAD in recorded and _HEAD in optional_tensors(description):  # tied, and written all the same
        shapes[_HEAD] = shapes[_EMBEDDING]
        stored_types[_HEAD] = stored_types[_EMBEDDING]
    shapes |= {name: tuple(tensor.shape) for name, tensor in extra.items()}
    tensors = {}
    for name, shape in shapes.items():
        kind = DTYPES[recorded[name][1]] if name in recorded else stored_types[name]
        tensors[name] = (dtype if dtype is not None and kind.is_floating_point else kind, shape)
    if max_shard_size is None and recorded.keys() == tensors.keys():
        return shards.plan_as_recorded(record, tensors)
    return shards.plan_by_size(tensors, max_shard_size or "5GB")


class _Weights:
    """Hugging Face tensors out of ours, of which it holds a layer's fused ones, for those that follow."""

    def __init__(self, reader: Reader, role: str, description: Description):
        self._reader = reader
        self._role = role
        self._places: dict[str, list[tuple[Stored, Piece]]] = {}
        for stored in stored_tensors(description):
            for piece in stored.pieces:
                self._places.setdefault(piece.name, []).append((stored, piece))
        self._layer: int | None = None
        self._held: dict[str, torch.Tensor] = {}

    def read(self, name: str) -> torch.Tensor:
        places = self._places.get(name) or self._places[_EMBEDDING]  # a tied head
        parts = [self._whole(stored)[piece.at : piece.at + piece.stop - piece.start] for stored, piece in places]
        return parts[0] if len(parts) == 1 else torch.cat(parts)  # pieces of one tensor follow each other

    def _whole(self, stored: Stored) -> torch.Tensor:
        if self._layer != stored.layer:
            self._held.clear()
            self._layer = stored.layer
        if stored.key in self._held:
            return self._held[stored.key]
        whole = self._reader.read(f"{self._role}.{stored.key}", stored.layer)
        if len(stored.pieces) > 1:
            self._held[stored.key] = whole
        return whole


def _json(content: dict) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
