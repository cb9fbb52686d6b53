"""A folder that appears whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_safe.errors import UserError


def check_unused(out: Path, needed_bytes: int) -> Path:
    """The folder under which `out` can be made: the nearest that is there.

    Raises:
        UserError: `out` is a file or holds something, lies under a file, or the disk has less than `needed_bytes` left.
    """
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out}: expected a new or an empty folder, found one with files in it; nothing is overwritten")
    for path in (out, *out.parents):
        if (path.exists() or path.is_symlink()) and not path.is_dir():
            raise UserError(f"{out}: expected a folder, found the file {path}")
    root = next(parent for parent in out.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(root).free
    if free < needed_bytes:
        raise UserError(f"{out}: expected {needed_bytes / 1e9:.2f} GB of free disk, found {free / 1e9:.2f} GB")
    return root


@contextmanager
def staged(out: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """An empty hidden folder that becomes `out`, synced to disk, when the block ends well; else nothing is left.

    Raises:
        UserError: as `check_unused`, and for every OSError of the block: the disk is full, there are no permissions.
    """
    out = Path(os.path.realpath(out))
    hidden = check_unused(out, needed_bytes) / f".{out.name}.converting"
    try:
        if hidden.exists():  # of a process that was killed
            shutil.rmtree(hidden)
        hidden.mkdir()
        yield hidden
        for path in (*hidden.rglob("*"), hidden):
            sync(path)
        out.parent.mkdir(parents=True, exist_ok=True)
        os.rename(hidden, out)
        sync(out.parent)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise UserError(f"{out}: not written: {error.strerror or error}{where}") from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def sync(path: Path) -> None:
    """See to it that a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
