"""Folders written by the safetensors library, by transformers' layout rules and by torch.save, read by us."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_safe.errors import UserError
from megatron_safe.huggingface import folder as folder_module
from megatron_safe.huggingface.folder import DTYPES, Folder, is_huggingface

FIRST, SECOND = "model-00001-of-00002", "model-00002-of-00002"


def random_tensor(shape, dtype, seed: int = 0) -> torch.Tensor:
    """Any bits that the type has, NaNs included."""
    size = torch.empty(shape, dtype=dtype).numel() * dtype.itemsize
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8, generator=generator)
    return bits.view(dtype).reshape(shape)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    def bits(tensor):
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(bits(one), bits(other))


def save(path: Path, tensors: dict) -> Path:
    (path / "config.json").write_text('{"model_type": "llama"}')
    safetensors.torch.save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def save_shards(path: Path, first: dict, second: dict, kind: str = "safetensors") -> Path:
    (path / "config.json").write_text("{}")
    prefix = "pytorch_" if kind == "bin" else ""
    places = {}
    for stem, tensors in ((FIRST, first), (SECOND, second)):
        file = f"{prefix}{stem}.{kind}"
        if kind == "bin":
            torch.save(tensors, path / file)
        else:
            safetensors.torch.save_file(tensors, path / file, {"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": 99}, "weight_map": places}
    (path / f"{prefix}model.{kind}.index.json").write_text(json.dumps(index))
    return path


def save_bin(path: Path, content) -> Path:
    (path / "config.json").write_text("{}")
    torch.save(content, path / "pytorch_model.bin")
    return path


def raw(path: Path, header: bytes | dict, data: bytes = b"", length: int | None = None) -> Path:
    (path / "config.json").write_text("{}")
    header = json.dumps(header).encode() if isinstance(header, dict) else header
    length = len(header) if length is None else length
    (path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + header + data)
    return path


def refused(act, *words: str) -> None:
    """One line, and every word in it."""
    with pytest.raises(UserError) as error:
        act()
    message = str(error.value)
    assert len(message.splitlines()) == 1
    assert [word for word in words if word not in message] == [], message


TENSORS = st.dictionaries(
    st.text("abc.ü\"\\", min_size=1, max_size=5),
    st.tuples(st.lists(st.integers(0, 5), max_size=3).map(tuple), st.sampled_from(list(DTYPES.values()))),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(specs=TENSORS, seed=st.integers(0, 99), in_bin=st.booleans())
def test_reads_what_the_libraries_write(specs, seed, in_bin):
    tensors = {name: random_tensor(*spec, seed + i) for i, (name, spec) in enumerate(specs.items())}
    with tempfile.TemporaryDirectory() as path:
        folder = Folder((save_bin if in_bin else save)(Path(path), tensors))
        assert {name: (entry.shape, entry.dtype) for name, entry in folder.entries.items()} == specs
        for name, tensor in tensors.items():
            assert same_bits(folder.read(name), tensor)
        if in_bin:
            assert list(folder.entries) == list(tensors)
        else:
            with safetensors.safe_open(folder.path / "model.safetensors", "pt") as library:
                filled = [name for name in library.offset_keys() if tensors[name].numel()]
                assert [name for name in folder.entries if tensors[name].numel()] == filled


@settings(max_examples=100, deadline=None)
@given(data=st.data(), in_bin=st.booleans(), block=st.sampled_from([1, 16, 100, 1 << 26]))
def test_reads_slices(data, in_bin, block):
    shape = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=3))
    tensor = random_tensor(shape, data.draw(st.sampled_from(list(DTYPES.values()))), 3)

    def part(size):
        return st.none() | st.lists(st.integers(0, size), min_size=2, max_size=2).map(sorted).map(tuple)

    rows = data.draw(part(shape[0]))
    columns = data.draw(part(shape[1])) if len(shape) == 2 else None
    with tempfile.TemporaryDirectory() as path, pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder_module, "_BLOCK", block)
        patch.setattr(folder_module, "_LARGE", data.draw(st.sampled_from([1, 1 << 22])))
        folder = Folder((save_bin if in_bin else save)(Path(path), {"before": torch.ones(3), "x": tensor}))
        found = folder.read("x", rows, columns)
    wanted = tensor[slice(*rows) if rows else slice(None)]
    if columns:
        wanted = wanted[:, slice(*columns)]
    assert same_bits(found, wanted)
    assert found.is_contiguous() and found.untyped_storage().nbytes() == found.numel() * found.dtype.itemsize


def test_slices_outside_of_the_tensor_are_errors(tmp_path):
    folder = Folder(save(tmp_path, {"x": torch.ones(3, 4), "scalar": torch.tensor(1.0), "cube": torch.ones(2, 2, 2)}))
    for rows in ((0, 4), (2, 1), (-1, 2)):
        with pytest.raises(ValueError, match="rows .* of x"):
            folder.read("x", rows)
    for name, columns in (("x", (0, 5)), ("scalar", (0, 0)), ("cube", (0, 1))):
        with pytest.raises(ValueError, match=f"columns .* of {name}"):
            folder.read(name, None, columns)
    with pytest.raises(ValueError, match="rows .* of scalar"):
        folder.read("scalar", (0, 1))


def test_a_bin_may_hold_views_and_shared_tensors(tmp_path):
    matrix = random_tensor((5, 7), torch.float32)
    content = {"a": matrix, "t": matrix.t(), "part": matrix[2:4], "p": torch.nn.Parameter(torch.randn(2, 2))}
    folder = Folder(save_bin(tmp_path, content))
    assert same_bits(folder.read("t", (1, 4), (0, 3)), matrix.t()[1:4, :3])
    assert same_bits(folder.read("part", (1, 2)), matrix[3:4])
    result = folder.read("p")
    assert same_bits(result, content["p"].detach()) and not result.requires_grad


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards(tmp_path, kind):
    first = {"b": random_tensor((2, 3), torch.bfloat16), "a": random_tensor((4,), torch.bfloat16)}
    second = {"c": random_tensor((5, 3), torch.float32)}
    folder = Folder(save_shards(tmp_path, first, second, kind))
    prefix = "pytorch_" if kind == "bin" else ""
    files = {name: entry.file for name, entry in folder.entries.items()}
    assert files == dict.fromkeys(first, f"{prefix}{FIRST}.{kind}") | dict.fromkeys(second, f"{prefix}{SECOND}.{kind}")
    for name in ("a", "c", "b", "a"):  # to and fro
        assert same_bits(folder.read(name), (first | second)[name])
    assert folder.record() == {
        "tensors": {name: [files[name], "BF16" if name in first else "F32"] for name in folder.entries},
        "index": {"metadata": {"total_size": 99}},
    }
    assert json.loads(json.dumps(folder.record())) == folder.record()


def test_safetensors_come_before_bins(tmp_path):
    save_shards(tmp_path, {"a": torch.ones(1)}, {"b": torch.ones(1)}, "bin")
    save_bin(tmp_path, {"c": torch.ones(1)})
    assert list(Folder(tmp_path).entries) == ["c"]
    save_shards(tmp_path, {"d": torch.ones(1)}, {"e": torch.ones(1)})
    assert list(Folder(tmp_path).entries) == ["d", "e"]
    save(tmp_path, {"f": torch.ones(1)})
    folder = Folder(tmp_path)
    assert list(folder.entries) == ["f"] and folder.index is None and folder.record()["index"] is None


def test_computed_buffers_are_passed_over(tmp_path):
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3), "h.0.attn.masked_bias": torch.ones(())}
    folder = Folder(save_shards(tmp_path, {"a": torch.ones(2)}, buffers))
    folder.check({"a": (2,)})
    del folder.index["weight_map"]["h.0.attn.masked_bias"]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(folder.index))
    folder = Folder(tmp_path)
    assert folder.record() == {
        "tensors": {"a": [f"{FIRST}.safetensors", "F32"]}, "index": {"metadata": {"total_size": 99 - 16}},
    }  # fmt: skip


def test_check(tmp_path):
    folder = Folder(save(tmp_path, {"a": torch.ones(2, 3), "b": torch.ones(4)}))
    folder.check({"a": (2, 3), "b": (4,)})
    folder.check({"a": (2, 3), "c": (1,)}, optional={"b", "c"})
    refused(lambda: folder.check({"a": (2, 3)}), "model.safetensors", "'b'", "no part of the architecture")
    refused(lambda: folder.check({"a": (2, 3), "b": (4,), "c": (7, 1)}), str(tmp_path), "'c'", "[7, 1]", "no such")
    refused(lambda: folder.check({"a": (3, 2), "b": (4,)}), "model.safetensors", "'a'", "[3, 2]", "[2, 3]")
    refused(lambda: folder.check({"a": (2, 3), "b": (5,)}, {"b"}), "'b'", "[5]", "[4]")


def test_every_cut_of_a_file_is_noticed(tmp_path):
    save(tmp_path, {"a": random_tensor((2, 3), torch.float32), "b": random_tensor((3,), torch.int8)})
    whole = (tmp_path / "model.safetensors").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "model.safetensors").write_bytes(whole[:size])
        refused(lambda: Folder(tmp_path), "model.safetensors", "expected", f"found {size}")
    (tmp_path / "model.safetensors").write_bytes(whole + b"\0")
    refused(lambda: Folder(tmp_path), f"expected {len(whole)} bytes", f"found {len(whole) + 1}")


@pytest.mark.parametrize("block", [16, 1 << 26])
def test_a_file_cut_after_it_was_opened(tmp_path, block, monkeypatch):
    monkeypatch.setattr(folder_module, "_BLOCK", block)
    folder = Folder(save(tmp_path, {"a": torch.ones(20, 3)}))
    os.truncate(tmp_path / "model.safetensors", (tmp_path / "model.safetensors").stat().st_size - 1)
    refused(lambda: folder.read("a"), "model.safetensors", "1 more bytes")


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "size", "words"),
    [
        (b"no json", 0, ["expected a header in JSON"]),
        (b"\xff\xfe{}", 0, ["expected a header in JSON"]),
        (b"[1]", 0, ["expected a header in JSON"]),
        (b"[" * 100_000, 0, ["expected a header in JSON"]),
        (b'{"a": 1, "a": 1}', 0, ["a name twice"]),
        ({"a": 3}, 0, ["'a'", "expected dtype, shape and data_offsets"]),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, ["'a'", "expected dtype, shape and data_offsets"]),
        ({"a": entry(shape=(-2,))}, 8, ["'a'", "expected dtype, shape and data_offsets"]),
        ({"a": entry(shape=(True, 2))}, 8, ["'a'", "expected dtype, shape and data_offsets"]),
        ({"a": entry(offsets=(0, 4, 8))}, 8, ["'a'", "expected dtype, shape and data_offsets"]),
        ({"a": entry("F8_E4M3", (8,))}, 8, ["'a'", "BF16", "'F8_E4M3'"]),
        ({"a": entry(shape=(3,))}, 8, ["'a'", "data_offsets [0, 12]", "found [0, 8]"]),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, 12, ["'b'", "data_offsets [8, 16]", "found [4, 12]"]),
        ({"a": entry(), "b": entry(offsets=(12, 20))}, 20, ["'b'", "data_offsets [8, 16]", "found [12, 20]"]),
        ({"a": entry(offsets=(8, 16))}, 16, ["'a'", "data_offsets [0, 8]", "found [8, 16]"]),
        ({"a": entry(), "b": entry(offsets=(8, 16))}, 8, ["as its header says"]),
    ],
)
def test_garbled_headers(tmp_path, header, size, words):
    refused(lambda: Folder(raw(tmp_path, header, bytes(size))), "model.safetensors", "expected", *words)


def test_absurd_header_lengths(tmp_path):
    for length in (3, 1 << 30, (1 << 64) - 1):
        refused(lambda length=length: Folder(raw(tmp_path, b"{}", length=length)), "model.safetensors", str(length))
    raw(tmp_path, b"{}", length=200_000_000)  # longer than the library takes, in a file with room for it
    os.truncate(tmp_path / "model.safetensors", 300_000_000)
    refused(lambda: Folder(tmp_path), "model.safetensors", "200000000")


def test_unfit_folders(tmp_path):
    refused(lambda: Folder(tmp_path), "config.json", "No such file")
    (tmp_path / "config.json").write_text("{")
    refused(lambda: Folder(tmp_path), "config.json", "expected a JSON object")
    (tmp_path / "config.json").write_text("[]")
    refused(lambda: Folder(tmp_path), "config.json", "found []")
    (tmp_path / "config.json").write_bytes(b"\xff")
    refused(lambda: Folder(tmp_path), "config.json", "expected a JSON object")
    (tmp_path / "config.json").write_text("{}")
    refused(lambda: Folder(tmp_path), str(tmp_path), "model.safetensors", "pytorch_model.bin", "found none")
    (tmp_path / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    refused(lambda: Folder(tmp_path), "pytorch_model.bin", "git lfs pull")
    (tmp_path / "model.safetensors").mkdir()
    refused(lambda: Folder(tmp_path), "model.safetensors", "Is a directory")
    refused(lambda: Folder(tmp_path / "nowhere"), "nowhere", "No such file")


def test_unfit_indices(tmp_path):
    path = save_shards(tmp_path, {"a": torch.ones(1)}, {"b": torch.ones(1)})
    index = path / "model.safetensors.index.json"
    one, two = f"{FIRST}.safetensors", f"{SECOND}.safetensors"
    for places, words in (
        ({"a": one, "b": two, "c": two}, [two, "'c'", "no such tensor"]),
        ({"a": one, "b": one}, [one, "'b'", "no such tensor"]),
        ({"a": two, "b": one}, [two, "'a'", f"found it in {one}"]),
        ({"a": one, "b": "other.safetensors"}, ["other.safetensors", "missing"]),
        ({"a": one, "b": "../other.safetensors"}, ["index.json", "'../other.safetensors'"]),
        ({"a": one, "b": "config.json"}, ["index.json", "'config.json'"]),
        ({"a": one, "b": 3}, ["index.json", "weight_map"]),
        ({}, ["index.json", "weight_map"]),
        (None, ["index.json", "weight_map"]),
    ):
        index.write_text(json.dumps({"weight_map": places}))
        refused(lambda: Folder(path), *words)
    index.write_text("{")
    refused(lambda: Folder(path), "index.json", "expected a JSON object")
    index.write_text(json.dumps({"weight_map": {"a": one, "b": two}}))
    safetensors.torch.save_file({"b": torch.ones(1), "x": torch.ones(1)}, path / two)
    refused(lambda: Folder(path), two, "'x'", "does not name")
    safetensors.torch.save_file({"b": torch.ones(1), "a": torch.ones(1)}, path / two)
    refused(lambda: Folder(path), two, "'a'", f"in {one} already")
    (path / two).unlink()
    refused(lambda: Folder(path), two, "missing")


class Code:
    file: Path

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_a_pickle_with_code_does_not_run(tmp_path):
    ran = Code.file = tmp_path / "ran"
    save_bin(tmp_path, {"a": torch.ones(1), "b": Code()})
    refused(lambda: Folder(tmp_path), "pytorch_model.bin", "the global", "refusing")
    assert not ran.exists()
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert ran.exists()  # it would have


def test_unfit_bins(tmp_path):
    save_bin(tmp_path, {"a": random_tensor((50,), torch.float32)})
    file = tmp_path / "pytorch_model.bin"
    whole = file.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        refused(lambda: Folder(tmp_path), "pytorch_model.bin", "cut short")
    file.write_bytes(whole[:100] + whole[180:])
    refused(lambda: Folder(tmp_path), "pytorch_model.bin", "expected")
    file.write_bytes(whole.replace(b"FloatStorage", b"FlootStorage"))
    refused(lambda: Folder(tmp_path), "pytorch_model.bin", "expected")
    torch.save({"a": torch.ones(1)}, file, _use_new_zipfile_serialization=False)
    refused(lambda: Folder(tmp_path), "pytorch_model.bin", "before torch 1.6")
    for content, words in (
        ([torch.ones(1)], ["dictionary of tensors", "list"]),
        ({"a": 3}, ["int 'a'"]),
        ({3: torch.ones(1)}, ["Tensor 3"]),
        ({"a": torch.ones(2, dtype=torch.complex64)}, ["'a'", "bfloat16", "found complex64"]),
        ({"a": torch.ones(2).to(torch.float8_e4m3fn)}, ["'a'", "found float8_e4m3fn"]),
        ({"a": torch.ones(2, 2).to_sparse()}, ["'a'", "sparse_coo"]),
    ):
        torch.save(content, file)
        refused(lambda: Folder(tmp_path), "pytorch_model.bin", *words)


def test_side_files(tmp_path):
    for kind in ("safetensors", "bin"):
        save_shards(tmp_path, {"a": torch.ones(1)}, {"b": torch.ones(1)}, kind)
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth", ".gitattributes", "model.gguf", "tf_model.h5"):
        (tmp_path / name).write_text("x")
    wanted = ["chat_template.jinja", "generation_config.json", "merges.txt", "README.md", "tokenizer.json",
              "tokenizer.model", "vocab.json"]  # fmt: skip
    (tmp_path / "blob").mkdir()
    (tmp_path / "blob" / "00").write_text("x")
    for name in wanted[1:]:
        (tmp_path / name).write_text("x")
    (tmp_path / wanted[0]).symlink_to("blob/00")  # as in the hub's cache
    (tmp_path / "large.json").touch()
    os.truncate(tmp_path / "large.json", 100_000_000)
    assert [path.name for path in Folder(tmp_path).side_files()] == sorted(["config.json", *wanted])


def test_is_huggingface(tmp_path):
    assert not is_huggingface(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert is_huggingface(str(tmp_path))
    (tmp_path / "state.json").write_text("{}")
    assert not is_huggingface(tmp_path)
    (tmp_path / "state.json").rename(tmp_path / "checkpoints")
    assert not is_huggingface(tmp_path)


READ_ALL = """
import re, sys
from pathlib import Path
from megatron_safe.huggingface.folder import Folder

def resident(kind):
    return int(re.search(kind + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

folder = Folder(sys.argv[1])
folder.read("small")
before = resident("VmRSS")
for name in folder.entries:
    if name == "large":
        folder.read(name, columns=(3, 5))
    else:
        folder.read(name)
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of resident memory")
@pytest.mark.parametrize("in_bin", [False, True])
def test_holds_one_tensor_and_one_block(tmp_path, in_bin):
    tensors = {f"t{i}": torch.zeros(1 << 14, 1 << 11, dtype=torch.int8) for i in range(5)}  # 32 MiB each
    tensors |= {"large": torch.zeros(3 << 15, 1 << 11, dtype=torch.int8), "small": torch.ones(3)}
    (save_bin if in_bin else save)(tmp_path, tensors)
    kilobytes = int(subprocess.check_output([sys.executable, "-c", READ_ALL, str(tmp_path)], timeout=100))
    assert 32 << 10 <= kilobytes < (32 + 64 + 16) << 10  # of 352 MiB
