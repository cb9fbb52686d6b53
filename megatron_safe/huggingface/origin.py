"""What a model from Hugging Face brought beside its weights goes with it through every checkpoint."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_safe.errors import UserError


@dataclass(frozen=True)
class Origin:
    """What a model brought with it besides weights, kept so that it can leave as it came.

    files: the content of config.json, of the tokenizer's files and the like: a run outlives the folders that it started
    from. record: `Folder.record()`, and under "carried" what `carry` gives.
    """

    files: dict[str, bytes]
    record: dict

    @staticmethod
    def of_files(paths: Iterable[Path], record: dict) -> "Origin":
        return Origin({path.name: path.read_bytes() for path in paths}, record)

    @staticmethod
    def of_checkpoint(checkpoint: Path, role: str) -> "Origin | None":
        """That of a role in one of our checkpoints; None where it never came from Hugging Face.

        Raises UserError where a file of it cannot be read.
        """
        folder = checkpoint / "huggingface" / role
        if not folder.is_dir():
            return None
        record = folder / "weights.json"
        try:
            content = json.loads(record.read_text(encoding="utf-8"))
            return Origin.of_files(sorted(path for path in folder.iterdir() if path != record), content)
        except (OSError, ValueError) as error:
            raise UserError(f"{record}: expected what was where in the Hugging Face folder, found {error!r}") from error

    @property
    def config(self) -> dict:
        """config.json's content."""
        return json.loads(self.files["config.json"])

    def write(self, checkpoint: Path, role: str) -> None:
        """Into a checkpoint that is being written."""
        folder = checkpoint / "huggingface" / role
        folder.mkdir(parents=True)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        (folder / "weights.json").write_text(json.dumps(self.record), encoding="utf-8")
