"""Small tensors that our model has no place for (safe-rlhf's normalizer) travel in the record of its origin."""

import base64

import torch

from megatron_safe.errors import UserError
from megatron_safe.huggingface.families import Description
from megatron_safe.huggingface.folder import DTYPES, Folder
from megatron_safe.huggingface.layout import huggingface_tensors, optional_tensors, stored_tensors

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def carry(folder: Folder, description: Description) -> dict:
    """Those tensors of a folder, in JSON's types: name -> [type as in DTYPES, shape, bytes in base64]."""
    names = {*huggingface_tensors(description), *optional_tensors(description)} & folder.entries.keys()
    ours = {piece.name for stored in stored_tensors(description) for piece in stored.pieces}
    found = {}
    for name in sorted(names - ours - {"lm_head.weight"}):  # a tied head is the embedding once more
        tensor = folder.read(name)
        content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        found[name] = [_NAMES[tensor.dtype], list(tensor.shape), base64.b64encode(content).decode()]
    return found


def carried(record: dict) -> dict[str, torch.Tensor]:
    """The tensors that `carry` put under "carried". Raises UserError for anything else."""
    tensors = {}
    try:
        for name, (kind, shape, content) in record.get("carried", {}).items():
            raw = bytearray(base64.b64decode(content, validate=True))
            tensors[name] = torch.frombuffer(raw, dtype=DTYPES[kind]).reshape(shape)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"the checkpoint's record of its Hugging Face folder: carried: {error!r:.200}") from error
    return tensors
