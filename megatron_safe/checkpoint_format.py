"""What a checkpoint's `state.json` and `manifest.json` say. Megatron-Core, which makes the rest, is not imported."""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from megatron_safe.errors import UserError

FORMAT = 1
_BLOCK = 1 << 22  # bytes that are read at a time


class FileSum(TypedDict):
    """What the manifest says of a file."""

    bytes: int
    crc32: int


@dataclass(frozen=True)
class Checkpoint:
    """One published checkpoint: where it is and what its state.json says.

    roles: for each the fields of its `architecture` ("model"), and the rows of its embedding ("vocab_size").
    """

    path: Path
    step: int
    seed: int
    roles: dict[str, dict]
    state: dict

    @staticmethod
    def read(path: Path) -> "Checkpoint":
        """Raises UserError for a state.json that is missing, unreadable or of another format."""
        try:
            content = json.loads((path / "state.json").read_text())
            if content["format"] != FORMAT:
                raise UserError(f"{path / 'state.json'}: expected format {FORMAT}, found {content['format']}")
            return Checkpoint(path, content["step"], content["seed"], content["roles"], content["state"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path / 'state.json'}: expected a checkpoint's state, found {error!r}") from error


def write_state(folder: Path, step: int, seed: int, roles: dict[str, tuple[dict, int]], state: dict) -> None:
    """state.json of a checkpoint that is being written; what `Checkpoint.read` reads.

    Args:
        roles: for each its architecture, and the rows of its embedding.
        state: JSON-serialisable state of the training loop.
    """
    saved = {name: {"model": model, "vocab_size": vocab_size} for name, (model, vocab_size) in roles.items()}
    content = {"format": FORMAT, "step": step, "seed": seed, "roles": saved, "state": state}
    (folder / "state.json").write_text(json.dumps(content, indent=1))


def write_manifest(folder: Path, sums: dict[str, FileSum]) -> None:
    """manifest.json of a checkpoint whose other files are all written. Args: sums: by path below `folder`."""
    (folder / "manifest.json").write_text(json.dumps(sums, indent=1))


def read_manifest(folder: Path) -> dict[str, FileSum]:
    """Raises UserError for one that is missing, unreadable or something else."""
    path = folder / "manifest.json"
    try:
        content = json.loads(path.read_text())
        return {name: FileSum(bytes=found["bytes"], crc32=found["crc32"]) for name, found in content.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: expected size and CRC-32 of every file, found {error!r}") from error


def fingerprint(path: Path) -> FileSum:
    """Reads the whole file."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            checksum = zlib.crc32(block, checksum)
    return FileSum(bytes=path.stat().st_size, crc32=checksum)
