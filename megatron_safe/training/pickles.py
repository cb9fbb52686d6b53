"""Checkpoints come from the network: nothing in one may run code.

A torch.distributed checkpoint has three kinds of pickles. Tensors and `common.pt` are read by `torch.load` with
`weights_only=True`, which builds nothing but tensors and plain data. The other two are closed here: the index
`.metadata`, which torch reads with plain `pickle.load`, and objects that are not tensors, which torch reads with
`weights_only=False` (and the index decides what is one).
"""

import pickletools
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner
from torch.distributed.checkpoint._traverse import set_element

from megatron_safe.errors import UserError

# Data classes and enums; the one function, _get_layout, looks up a name in a table of three.
_ALLOWED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(("torch.distributed.checkpoint.planner", name) for name in (
        "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType",
    )),
    *(("torch.distributed.checkpoint.metadata", name) for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )),
    *(("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
}  # fmt: skip
_TEXTS = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
_FETCHES = {"BINGET", "LONG_BINGET"}
# What Python writes for such classes (protocols 2 to 5), with STACK_GLOBAL looked into. Everything else is refused:
# the other ways to name a class (GLOBAL, INST, EXT, persistent ids), and ways to move the stack under our eyes.
_HARMLESS = _TEXTS | _FETCHES | {
    "APPEND", "APPENDS", "BINFLOAT", "BININT", "BININT1", "BININT2", "BUILD", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE",
    "FRAME", "LONG1", "MARK", "MEMOIZE", "NEWFALSE", "NEWOBJ", "NEWTRUE", "NONE", "PROTO", "REDUCE", "SETITEM",
    "SETITEMS", "STACK_GLOBAL", "STOP", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
}  # fmt: skip


def check_index(path: Path) -> None:
    """Read the opcodes of a checkpoint's `.metadata`, without running them.

    Raises:
        UserError: it is no pickle, or names anything that an index of tensors does not need.
    """

    def refuse(found: str) -> UserError:
        return UserError(f"{path}: expected an index of tensors, found {found}; refusing to load it")

    memo: list[str | None] = []
    last: list[str | None] = []  # the texts that the opcodes up to here left on top of the stack, None for all else
    try:
        for opcode, argument, _ in pickletools.genops(path.read_bytes()):
            name = opcode.name
            if name not in _HARMLESS:
                raise refuse(f"the pickle opcode {name}" + (f" {argument!r}" if argument is not None else ""))
            if name == "MEMOIZE":
                memo.append(last[-1] if last else None)
            elif name in _TEXTS:
                last.append(argument)
            elif name in _FETCHES:
                last.append(memo[argument])
            elif name == "STACK_GLOBAL":
                wanted = tuple(last[-2:])
                if wanted not in _ALLOWED:
                    raise refuse("the global " + ".".join(str(part) for part in wanted))
                last = [None]
            elif name not in ("PROTO", "FRAME"):
                last = [None]
    except (OSError, ValueError, IndexError) as error:
        raise refuse(f"an unreadable pickle ({error})") from error


def read_objects_safely() -> None:
    """Make Megatron-Core read a checkpoint's objects with `weights_only=True`. Harmless when called again."""

    def load_bytes(planner, read_item, value) -> None:
        place = planner.mappings[read_item.dest_index.fqn]
        set_element(planner.original_state_dict, place, torch.load(value, weights_only=True))

    MCoreLoadPlanner.load_bytes = load_bytes
