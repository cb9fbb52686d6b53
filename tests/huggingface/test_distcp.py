"""The files of a checkpoint's weights: what one writer or many ranks wrote is read back, and nothing else is."""

import pickle
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_safe.errors import UserError
from megatron_safe.huggingface import distcp
from megatron_safe.huggingface.distcp import Reader, Writer


def write(writer: Writer, key: str, part: torch.Tensor, shape=None, offsets=None, numbers: int = 10**9) -> None:
    """In blocks of so many numbers; a whole tensor by default."""
    shape = shape or tuple(part.shape)
    offsets = offsets or (0,) * part.dim()
    writer.add(key, shape, offsets, tuple(part.shape), part.dtype, part.reshape(-1).split(numbers))


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_tensors_are_read_back_however_they_were_cut(tmp_path_factory, data):
    """As ranks of any layout save them: a grid of parts, each in its own place."""
    folder = tmp_path_factory.mktemp("weights")
    layers, rows, columns = (data.draw(st.integers(1, 7), label=name) for name in ("layers", "rows", "columns"))
    cuts = [
        sorted(data.draw(st.sets(st.integers(1, max(1, size - 1)), max_size=3)) | {0, size}) if size > 1 else [0, 1]
        for size in (rows, columns)
    ]
    whole = torch.randn(layers, rows, columns)
    with Writer(folder) as writer:
        for layer in range(layers):
            for top, bottom in zip(cuts[0], cuts[0][1:], strict=False):
                for left, right in zip(cuts[1], cuts[1][1:], strict=False):
                    part = whole[layer : layer + 1, top:bottom, left:right].clone()
                    write(writer, "x", part, tuple(whole.shape), (layer, top, left), data.draw(st.integers(1, 9)))
    reader = Reader(folder)
    assert torch.equal(reader.read("x"), whole)
    for layer in range(layers):
        assert torch.equal(reader.read("x", layer), whole[layer])


KEY = "decoder.final_layernorm.weight"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Weights of two tensors, to be spoilt."""
    with Writer(tmp_path) as writer:
        write(writer, KEY, torch.randn(32))
        write(writer, "other", torch.randn(2, 3))
    return tmp_path


def change_index(folder: Path, change) -> None:
    file = folder / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    change(metadata)
    file.write_bytes(pickle.dumps(metadata))


def without_a_tensor(metadata):
    del metadata.state_dict_metadata[KEY]


def of_another_shape(metadata):
    metadata.state_dict_metadata[KEY].size = torch.Size([33])


def without_a_part(metadata):
    metadata.state_dict_metadata[KEY].chunks.clear()


def without_a_place(metadata):
    del metadata.storage_data[MetadataIndex(KEY, (0,))]


def that_leads_elsewhere(metadata):
    metadata.storage_data[MetadataIndex(KEY, (0,))].relative_path = "../state.json"


def that_points_nowhere(metadata):
    metadata.storage_data[MetadataIndex(KEY, (0,))].offset += 10


@pytest.mark.parametrize(
    "change, what",
    [
        (without_a_tensor, "found no such tensor"),
        (of_another_shape, r"of shape \[32\], found \[33\]"),
        (without_a_part, "found 0 of 32 numbers"),
        (without_a_place, "expected the file of"),
        (that_leads_elsewhere, "expected the file of"),
        (that_points_nowhere, "expected a tensor of"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(folder, change, what):
    change_index(folder, change)
    reader = Reader(folder)
    with pytest.raises(UserError, match=what) as error:
        reader.check(KEY, (32,))
        reader.read(KEY)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


class Harm:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/harm-of-a-checkpoint"),))


def test_an_index_that_runs_code_is_not_read(folder):
    change_index(folder, lambda metadata: setattr(metadata, "planner_data", Harm()))
    with pytest.raises(UserError, match="refusing to load it"):
        Reader(folder)
    assert not Path("/tmp/harm-of-a-checkpoint").exists()


@pytest.mark.parametrize("content", [b"", b"garbage"])
def test_a_tensor_that_is_none(folder, content):
    file = next(folder.glob("*.distcp"))
    file.write_bytes(content * 4000)
    with pytest.raises(UserError, match=f"{file.name}: expected a tensor of {KEY}, found"):
        Reader(folder).read(KEY)


def test_no_weights_at_all(tmp_path):
    with pytest.raises(UserError, match="expected an index of tensors"):
        Reader(tmp_path)


def test_the_sums_are_those_of_the_files(tmp_path, monkeypatch):
    """Of every file, and there are several where the weights are large."""
    monkeypatch.setattr(distcp, "FILE_BYTES", 300_000)
    tensors = {f"t{i}": torch.randn(100 + 9000 * i) for i in range(20)}
    with Writer(tmp_path) as writer:
        for name, tensor in tensors.items():
            write(writer, name, tensor, numbers=5000)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert writer.sums == {name: {"bytes": len(raw), "crc32": zlib.crc32(raw)} for name, raw in files.items()}
    assert sum(name.endswith(".distcp") for name in files) > 10
    reader = Reader(tmp_path)
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("count", [0, 5, 7])
def test_blocks_that_do_not_fill_the_tensor(tmp_path, count):
    with pytest.raises(ValueError, match="x: expected 6 numbers of torch.float32"), Writer(tmp_path) as writer:
        writer.add("x", (2, 3), (0, 0), (2, 3), torch.float32, torch.ones(count).split(2))


class Full(Exception):
    pass


def test_an_error_of_the_block_is_the_one_that_is_raised(tmp_path):
    with pytest.raises(Full), Writer(tmp_path) as writer:
        write(writer, "x", torch.ones(3))
        raise Full
    assert not (tmp_path / ".metadata").exists()


@pytest.mark.parametrize("size", [3, 9_000_000])
def test_a_full_disk_is_an_os_error(tmp_path, monkeypatch, size):
    """Torch's own error says nothing of the disk."""
    monkeypatch.setattr(Path, "open", lambda path, mode: open("/dev/full", "wb"))
    with pytest.raises(OSError, match="No space left"), Writer(tmp_path) as writer:
        write(writer, "x", torch.ones(size), numbers=100_000)
        write(writer, "y", torch.ones(3))
