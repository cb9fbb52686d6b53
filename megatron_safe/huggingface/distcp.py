"""The weights/ of a checkpoint, written and read one tensor at a time, without a process group.

The format is torch.distributed.checkpoint's, plus two small files of Megatron-Core's: `.distcp` files hold one
`torch.save` after the other, and the index `.metadata` says which part of which tensor lies where, so that a checkpoint
loads in any layout. Tensors of the layers are stacked: [layers, ...] under one key.
"""

import io
import json
import math
import os
import pickle
import threading
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import BinaryIO

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_safe.checkpoint_format import FileSum, fingerprint
from megatron_safe.errors import UserError, first_line

FILE_BYTES = 1 << 30  # about: several files, because a checkpoint is verified by all ranks, file by file
_AHEAD = 4  # blocks that may wait to be written
_LARGE = 1 << 16  # bytes from which a second thread is worth its while


class Writer:
    """Writes a weights folder; a context manager.

    The caller produces blocks of numbers, a second thread writes them, and a third makes the manifest's CRC-32. No
    tensor is ever held: only the few blocks on their way, whose memory is used again and again. An interrupt, which
    Python raises in the main thread, never comes between torch and the file; nor can it leave a lock behind, because
    the threads share nothing but queues that are written in C.

    Attributes:
        sums: of the files, after the `with` block. To sync them to the disk is left to the caller.
    """

    def __init__(self, folder: Path):
        """Args: folder: an empty one."""
        self.sums: dict[str, FileSum] = {}
        self._folder = folder
        self._entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._queue: SimpleQueue = SimpleQueue()  # (index, object), then its blocks if it is a tensor; None at the end
        self._room: SimpleQueue = SimpleQueue()  # one of anything for each item that may wait
        for _ in range(_AHEAD):
            self._room.put(None)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> "Writer":
        self._thread.start()
        return self

    def add(
        self,
        key: str,
        shape: tuple[int, ...],
        offsets: tuple[int, ...],
        sizes: tuple[int, ...],
        dtype: torch.dtype,
        blocks: Iterable[torch.Tensor],
    ) -> None:
        """Write a part of a tensor; the last blocks of it are still on their way when this returns.

        Args:
            key: the tensor's.
            shape: of the whole tensor.
            offsets: where the part begins in it.
            sizes: the part's shape; as long as `shape`, as is `offsets`.
            dtype: of all the tensor's blocks.
            blocks: the part's numbers in order, contiguous, not to be changed afterwards.

        Raises:
            OSError: this part or one before could not be written.
            ValueError: the blocks have more or fewer numbers than the part.
        """
        if key not in self._entries:
            self._entries[key] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), [])
        self._entries[key].chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
        self._put((MetadataIndex(key, offsets), torch.empty(sizes, dtype=dtype)))  # whose memory is never touched
        missing = math.prod(sizes)
        for block in blocks:
            missing -= block.numel()
            if missing < 0 or block.dtype != dtype:
                break
            self._put(block)
        if missing:
            raise ValueError(f"{key}: expected {math.prod(sizes)} numbers of {dtype}, found others")

    def add_nothing(self, key: str) -> None:
        """Write an object that is None: Megatron-Core looks for one beside each linear layer (FP8's state)."""
        self._entries[key] = BytesStorageMetadata()
        self._put((MetadataIndex(key), [None]))

    def _put(self, item) -> None:
        if self._failure is not None:
            raise self._failure
        self._room.get()
        self._queue.put(item)

    def _take(self):
        item = self._queue.get()
        self._room.put(None)
        return item

    def _work(self) -> None:
        with ThreadPoolExecutor(1) as checksums:
            files = _Files(self._folder, self._take, checksums, self.sums)
            while not files.ended and (item := self._take()) is not None:
                if self._failure is None:  # else what still comes is only taken away
                    try:
                        index, content = item
                        self._places[index] = files.save(content)
                    except BaseException as error:
                        self._failure = error
            try:
                files.close_file()
            except OSError as error:  # of what was still buffered
                self._failure = self._failure or error

    def __exit__(self, kind, *exception) -> None:
        self._queue.put(None)
        self._thread.join()
        if kind is not None:
            return
        if self._failure is not None:
            raise self._failure
        metadata = Metadata(
            self._entries, storage_data=self._places, storage_meta=StorageMeta(), version=CURRENT_DCP_VERSION
        )
        (self._folder / ".metadata").write_bytes(pickle.dumps(metadata))
        backends = {"sharded_backend": "torch_dist", "common_backend": "torch"}
        versions = {"sharded_backend_version": 1, "common_backend_version": 1}
        (self._folder / "metadata.json").write_text(json.dumps(backends | versions))
        torch.save({}, self._folder / "common.pt")
        for name in (".metadata", "metadata.json", "common.pt"):
            self.sums[name] = fingerprint(self._folder / name)


class _Files(io.RawIOBase):
    """The .distcp files, one after the other, as torch.save sees them.

    It writes what surrounds a tensor, and where the tensor's bytes belong it seeks past them (`skip_data`): those are
    the blocks that `take` gives, or None where no more will come. Torch's zip writer does not survive an exception of
    what it writes to: after one, the rest is swallowed, and `save` raises it at the end.
    """

    def __init__(self, folder: Path, take: Callable, checksums: ThreadPoolExecutor, sums: dict[str, FileSum]):
        self._folder, self._take, self._checksums, self._sums = folder, take, checksums, sums
        self.ended = False
        self._file: BinaryIO | None = None
        self._name = ""
        self._bytes = self._crc32 = 0
        self._failure: Exception | None = None

    def save(self, content) -> _StorageInfo:
        """torch.save at the end of the current file, or in a new one; where that is."""
        if self._file is None or self._bytes >= FILE_BYTES:
            self.close_file()
            self._name = f"__0_{len(self._sums)}.distcp"
            self._file = (self._folder / self._name).open("xb")
        start = self._bytes
        with torch.serialization.skip_data():
            torch.save(content, self)
        if self._failure is not None:
            raise self._failure
        self._file.flush()
        if hasattr(os, "posix_fadvise"):
            # Linux starts to write such pages at once and cannot drop them yet: a later fsync finds little to do.
            os.posix_fadvise(self._file.fileno(), start, self._bytes - start, os.POSIX_FADV_DONTNEED)
        return _StorageInfo(self._name, start, self._bytes - start)

    def write(self, data) -> int:
        size = len(data)
        if self._failure is None:
            # Both let go of the GIL. The memory is the caller's and must not outlive this call.
            later = self._checksums.submit(zlib.crc32, data, self._crc32) if size >= _LARGE else None
            try:
                self._file.write(data)
            except OSError as error:
                self._failure = error
            self._crc32 = later.result() if later else zlib.crc32(data, self._crc32)
            self._bytes += size
        return size

    def seek(self, count: int, whence: int = os.SEEK_SET) -> int:
        while count > 0:
            block = self._take()
            if block is None:  # the caller gave up
                self.ended = True
                self._failure = self._failure or EOFError("the tensor ends here")
                break
            count -= self.write(memoryview(block.reshape(-1).view(torch.uint8).numpy()))
        return self._bytes

    def close_file(self) -> None:
        if self._file is not None:
            self._sums[self._name] = FileSum(bytes=self._bytes, crc32=self._crc32)
            self._bytes = self._crc32 = 0
            self._file.close()


class Reader:
    """Reads tensors of a weights folder, each by itself; whatever the layout was in which they were saved."""

    def __init__(self, folder: Path):
        """Raises UserError for an index that cannot be read, or names anything that one of tensors does not need."""
        # Here, because it imports Megatron-Core, for which an import of weights has no need to wait.
        from megatron_safe.training.pickles import check_index

        self._folder = folder
        check_index(folder / ".metadata")
        try:
            metadata = FileSystemReader(folder).read_metadata()
            self._entries = dict(metadata.state_dict_metadata)
            self._places = dict(metadata.storage_data)
        except Exception as error:  # garbled, it fails in any way
            raise self._wrong(f"an index of tensors, found {error!r:.200}") from error

    def keys(self) -> list[str]:
        """Of all tensors."""
        return [key for key, entry in self._entries.items() if isinstance(entry, TensorStorageMetadata)]

    def dtype(self, key: str) -> torch.dtype:
        return self._entry(key).properties.dtype

    def check(self, key: str, shape: tuple[int, ...]) -> None:
        """Raises UserError unless there is such a tensor."""
        found = tuple(self._entry(key).size)
        if found != shape:
            raise self._wrong(f"{key} of shape {list(shape)}, found {list(found)}")

    def read(self, key: str, layer: int | None = None) -> torch.Tensor:
        """A tensor, or one layer of a stacked one. At most twice its size is held.

        Raises:
            UserError: there is none, a part of it is missing, or lies in a file that cannot be read.
        """
        entry = self._entry(key)
        dimensions = range(len(entry.size))
        low = [0 if layer is None or i else layer for i in dimensions]
        high = [layer + 1 if layer is not None and not i else entry.size[i] for i in dimensions]
        wanted = tuple(high[i] - low[i] for i in dimensions)
        result, filled = None, 0
        for chunk in entry.chunks:
            at = chunk.offsets
            begin = [max(low[i], at[i]) for i in dimensions]
            end = [min(high[i], at[i] + chunk.sizes[i]) for i in dimensions]
            if any(begin[i] >= end[i] for i in dimensions):
                continue
            part = self._chunk(key, chunk)
            if tuple(part.shape) == wanted and begin == low:  # all of it in one: no copy
                return part if layer is None else part[0]
            if result is None:
                result = torch.empty(wanted, dtype=entry.properties.dtype)
            there = tuple(slice(begin[i] - low[i], end[i] - low[i]) for i in dimensions)
            here = tuple(slice(begin[i] - at[i], end[i] - at[i]) for i in dimensions)
            result[there].copy_(part[here])
            filled += math.prod(end[i] - begin[i] for i in dimensions)
        if filled != math.prod(wanted):
            raise self._wrong(f"all of {key}, found {filled} of {math.prod(wanted)} numbers")
        return result if layer is None else result[0]

    def _entry(self, key: str) -> TensorStorageMetadata:
        entry = self._entries.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise self._wrong(f"tensor {key}, found no such tensor")
        return entry

    def _chunk(self, key: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
        place = self._places.get(MetadataIndex(key, chunk.offsets))
        # A name with folders in it could lead anywhere.
        if place is None or Path(place.relative_path).name != place.relative_path:
            raise self._wrong(f"the file of {key}, found {place!r:.200}")
        path = self._folder / place.relative_path
        try:
            with path.open("rb") as file:
                view = _create_file_view(file, place.offset, place.length)
                tensor = torch.load(view, map_location="cpu", weights_only=True)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}") from error
        except Exception as error:  # of any kind: pickle's, the zip reader's
            raise UserError(f"{path}: expected a tensor of {key}, found {first_line(error)}") from error
        if not isinstance(tensor, torch.Tensor) or tensor.shape != chunk.sizes:
            raise UserError(f"{path}: expected {list(chunk.sizes)} of {key}, found {tensor!r:.80}")
        return tensor

    def _wrong(self, what: str) -> UserError:
        return UserError(f"{self._folder / '.metadata'}: expected {what}")
