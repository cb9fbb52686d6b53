"""Weights straight from a Hugging Face folder into a role, in any layout: each rank reads the rows it holds.

Legend: h hidden size, v this rank's vocabulary shard.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_safe.errors import UserError
from megatron_safe.huggingface.carried import carry
from megatron_safe.huggingface.families import Description, describe, with_normalizer
from megatron_safe.huggingface.folder import Folder
from megatron_safe.huggingface.layout import Stored, huggingface_tensors, optional_tensors, stored_tensors
from megatron_safe.huggingface.origin import Origin
from megatron_safe.models.llama import Llama, global_name

# Megatron-Core's own layers name their norms after themselves, Transformer Engine's after the product they feed; a
# checkpoint has the latter's names.
_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


@dataclass(frozen=True)
class HuggingFaceModel:
    """A folder whose config can be expressed and whose tensors are all there."""

    folder: Folder
    description: Description

    @staticmethod
    def open(path: Path) -> "HuggingFaceModel":
        """Raises UserError, naming file and field or tensor."""
        folder = Folder(path)
        description = describe(folder.config, folder.path / "config.json")
        optional = optional_tensors(description)
        folder.check(huggingface_tensors(description), set(optional))
        if "lm_head.weight" in optional.keys() & folder.entries.keys():
            _check_tied(folder)
        if description.normalizer:
            mean, var = (float(folder.read(name)) for name in ("normalizer.mean", "normalizer.var"))
            description = with_normalizer(description, mean, var, folder.path)
        return HuggingFaceModel(folder, description)

    @property
    def origin(self) -> Origin:
        """What goes into the checkpoints of a role that starts here."""
        record = self.folder.record() | {"carried": carry(self.folder, self.description)}
        return Origin.of_files(self.folder.side_files(), record)

    @property
    def path(self) -> Path:
        return self.folder.path

    @property
    def roles(self) -> tuple[str, ...]:
        """What a role may start from here, by the names of `Checkpoint.roles`."""
        return ("actor",) if self.description.head == "language" else ("score",)


def _check_tied(folder: Folder, rows_at_a_time: int = 4096) -> None:
    rows = folder.entries["lm_head.weight"].shape[0]
    for start in range(0, rows, rows_at_a_time):
        part = (start, min(rows, start + rows_at_a_time))
        if not torch.equal(folder.read("lm_head.weight", part), folder.read("model.embed_tokens.weight", part)):
            raise UserError(
                f"{folder.path}: expected lm_head.weight to equal model.embed_tokens.weight, because config.json ties "
                f"them (tie_word_embeddings); found other numbers from row {part[0]} on"
            )


def copy_rows(
    folder: Folder, stored: Stored, start: int, target: torch.Tensor, columns: tuple[int, int] | None = None
) -> None:
    """Fill `target` with rows `start` to `start + len(target)` of one of our tensors; rows of padding become 0."""
    stop, covered = start + target.size(0), 0
    for piece in stored.pieces:
        first, last = max(start, piece.at), min(stop, piece.at + piece.stop - piece.start)
        if first < last:
            rows = piece.start + first - piece.at, piece.start + last - piece.at
            target[first - start : last - start].copy_(folder.read(piece.name, rows, columns))
            covered += last - first
    if covered < target.size(0):  # pieces lie one after the other from row 0 on
        target[covered:].zero_()


@torch.no_grad()
def load_weights(module: Llama, vocab_multiple: int, source: HuggingFaceModel) -> None:
    """All of this rank's weights, or the trunk below the fresh head of a scalar model that starts from a language one.

    Args:
        vocab_multiple: of the module's own model; the folder knows of no padding.
    """
    description = source.description
    model = dataclasses.replace(description.model, vocab_multiple=vocab_multiple)
    stored = {(each.key, each.layer): each for each in stored_tensors(dataclasses.replace(description, model=model))}
    tp = module.pg_collection.tp
    for name, parameter in module.named_parameters():
        key, layer = _key(global_name(module, name), module)
        if key.startswith("output_layer.") and module.head != description.head:
            continue
        each = stored[key, layer]
        dim = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
        if dim == 1:
            width = parameter.size(1)
            copy_rows(source.folder, each, 0, parameter, (tp.rank() * width, (tp.rank() + 1) * width))
            continue
        # SwiGLU stores gate and up stacked in each shard, so each half is split by itself.
        halves = parameter.chunk(2) if dim == 0 and key.endswith("linear_fc1.weight") else (parameter,)
        for i, half in enumerate(halves):
            start = 0 if dim is None else i * half.size(0) * tp.size() + tp.rank() * half.size(0)
            copy_rows(source.folder, each, start, half)


def _key(name: str, module: Llama) -> tuple[str, int | None]:
    """A parameter's name in a checkpoint, and its layer."""
    if name == "output_layer.weight" and module.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight", None
    parts = name.split(".", 3)
    if parts[:2] != ["decoder", "layers"]:
        return name, None
    return f"decoder.layers.{_NORMS.get(parts[3], parts[3])}", int(parts[2])
