"""Files and plans against those of the safetensors library and of transformers' save_pretrained."""

import json
import math
import tempfile
import weakref
from pathlib import Path

import pytest
import safetensors.torch
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig

from megatron_safe.errors import UserError
from megatron_safe.huggingface.folder import DTYPES, Folder
from megatron_safe.huggingface.shards import Plan, parse_size, plan_as_recorded, plan_by_size, write_shards

SPECS = st.dictionaries(
    st.text("abc.ü\"\\\n\x01", min_size=1, max_size=5),
    st.tuples(st.sampled_from(list(DTYPES.values())), st.lists(st.integers(0, 5), max_size=3).map(tuple)),
    min_size=1,
    max_size=8,
)


def random_tensors(specs: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Any bits that the types have, NaNs included."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (dtype, shape) in specs.items():
        size = math.prod(shape) * dtype.itemsize
        bits = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8, generator=generator)
        tensors[name] = bits.view(dtype).reshape(shape)
    return tensors


def specs_of(tensors: dict) -> dict:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir() if "model" in file.name}


def make_folder(path: Path, plan: Plan, tensors: dict) -> Folder:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    write_shards(path, plan, tensors.__getitem__)
    return Folder(path)


@settings(max_examples=60, deadline=None)
@given(specs=SPECS, seed=st.integers(0, 99))
def test_files_are_those_of_the_library_to_the_byte(specs, seed):
    tensors = random_tensors(specs, seed)
    with tempfile.TemporaryDirectory() as path:
        plan = plan_by_size(specs)
        write_shards(Path(path), plan, tensors.__getitem__)
        [(name, found)] = contents(Path(path)).items()
        assert name == "model.safetensors" and plan.index is None
        assert found == safetensors.torch.save(tensors, {"format": "pt"})
        loaded = safetensors.torch.load(found)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in loaded.items()} == specs


@settings(max_examples=100, deadline=None)
@given(specs=SPECS, limit=st.integers(1, 300))
def test_plans_are_those_of_transformers(specs, limit):
    # The reference takes empty tensors for views of one another, as they have the same address: none.
    specs = {name: (dtype, tuple(size + 1 for size in shape)) for name, (dtype, shape) in specs.items()}
    wanted = split_torch_state_dict_into_shards(
        random_tensors(specs), filename_pattern="model{suffix}.safetensors", max_shard_size=limit
    )
    plan = plan_by_size(specs, limit)
    assert {file: sorted(shard) for file, shard in plan.files.items()} == {
        file: sorted(names) for file, names in wanted.filename_to_tensors.items()
    }
    assert plan.total_bytes == wanted.metadata["total_size"]
    assert (plan.index is not None) == wanted.is_sharded


@pytest.mark.parametrize("limit", ["20KB", "8KB", "2KB", "1GB"])
@pytest.mark.parametrize("tied", [False, True])
def test_folders_are_those_of_save_pretrained(tmp_path, limit, tied):
    config = LlamaConfig(
        vocab_size=37, hidden_size=24, intermediate_size=36, num_hidden_layers=11, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=limit)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    (tmp_path / "ours").mkdir()
    write_shards(tmp_path / "ours", plan_by_size(specs_of(tensors), limit), tensors.__getitem__)
    theirs = contents(tmp_path / "theirs")
    assert contents(tmp_path / "ours") == theirs
    assert len(theirs) > 2 or limit == "1GB"

    # And the way back, from what Folder has written down about it, through JSON.
    folder = Folder(tmp_path / "theirs")
    record = json.loads(json.dumps(folder.record()))
    specs = {name: (entry.dtype, entry.shape) for name, entry in reversed(folder.entries.items())}
    (tmp_path / "back").mkdir()
    write_shards(tmp_path / "back", plan_as_recorded(record, specs), folder.read)
    assert contents(tmp_path / "back") == theirs


@settings(max_examples=40, deadline=None)
@given(data=st.data(), specs=SPECS)
def test_any_placement_comes_back(data, specs):
    """Whoever wrote the index and dealt the tensors out, whatever else the index says."""
    places = {name: data.draw(st.sampled_from(["x.safetensors", "a-b.safetensors"])) for name in specs}
    index = data.draw(st.fixed_dictionaries({}, optional={
        "metadata": st.fixed_dictionaries({}, optional={"total_size": st.integers(0, 9) | st.text(max_size=2)}),
        "other": st.lists(st.integers(), max_size=2),
    }))  # fmt: skip
    index["weight_map"] = places
    tensors = random_tensors(specs)
    with tempfile.TemporaryDirectory() as path:
        given, back = Path(path) / "given", Path(path) / "back"
        given.mkdir()
        for file in set(places.values()):
            mine = {name: tensor for name, tensor in tensors.items() if places[name] == file}
            safetensors.torch.save_file(mine, given / file, {"format": "pt"})
        (given / "config.json").write_text("{}")
        (given / "model.safetensors.index.json").write_text(json.dumps(index))
        folder = Folder(given)
        again = make_folder(back, plan_as_recorded(folder.record(), specs), tensors)
        assert again.index == index == folder.index
        for file in set(places.values()):
            assert (given / file).read_bytes() == (back / file).read_bytes()


@pytest.mark.parametrize("sharded", [False, True])
def test_bins_come_back_as_safetensors(tmp_path, sharded):
    tensors = random_tensors({"a": (torch.float16, (3, 2)), "b": (torch.float32, ()), "c": (torch.float16, (0,))})
    (tmp_path / "config.json").write_text("{}")
    if sharded:
        names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
        places = {"a": names[0], "b": names[1], "c": names[0]}
        for file in names:
            torch.save({name: tensors[name] for name in tensors if places[name] == file}, tmp_path / file)
        index = {"metadata": {"total_size": 16}, "weight_map": places}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    folder = Folder(tmp_path)
    back = make_folder(tmp_path / "back", plan_as_recorded(folder.record(), specs_of(tensors)), tensors)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    if sharded:
        assert back.index == {"metadata": {"total_size": 16}, "weight_map": {"a": first, "b": second, "c": first}}
    assert set(contents(tmp_path / "back")) == (
        {first, second, "model.safetensors.index.json"} if sharded else {"model.safetensors"}
    )
    for name, tensor in tensors.items():
        assert back.entries[name].dtype == tensor.dtype
        assert torch.equal(back.read(name).reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_the_index_follows_other_types():
    record = {
        "tensors": {"a": ["x.safetensors", "BF16"], "b": ["y.safetensors", "F32"]},
        "index": {"metadata": {"total_size": 32, "more": 1}},
    }
    plan = plan_as_recorded(record, {"a": (torch.float32, (5,)), "b": (torch.float32, (5,))})
    assert plan.index == {
        "metadata": {"total_size": 32 + 10, "more": 1}, "weight_map": {"a": "x.safetensors", "b": "y.safetensors"},
    }  # fmt: skip
    assert record["index"] == {"metadata": {"total_size": 32, "more": 1}}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"tensors": {"a": ["../x.safetensors", "F32"]}, "index": None}, "'../x.safetensors'"),
        ({"tensors": {"a": ["/x.bin", "F32"]}, "index": None}, "'/x.bin'"),
        ({"tensors": {"a": ["config.json", "F32"]}, "index": None}, "'config.json'"),
        ({"tensors": {"a": ["x.safetensors", "F8_E4M3"]}, "index": None}, "F8_E4M3"),
        ({"tensors": {"a": "x.safetensors"}, "index": None}, "expected file and type"),
        ({"tensors": {"a": ["x.safetensors", "F32"]}}, "index"),
        ({"tensors": {"a": ["x.safetensors", "F32"]}, "index": 3}, "expected file and type"),
        ({"tensors": [], "index": None}, "expected file and type"),
        ([], "expected file and type"),
        ({"tensors": {}, "index": None}, "'a' not there"),
        ({"tensors": {"a": ["x.bin", "F32"], "b": ["x.bin", "F32"]}, "index": None}, "'b' only there"),
    ],
)
def test_unfit_records(record, words):
    with pytest.raises(UserError, match="record of its Hugging Face folder") as error:
        plan_as_recorded(record, {"a": (torch.float32, (2,))})
    assert words in str(error.value) and len(str(error.value).splitlines()) == 1


def test_parse_size():
    sizes = {"5GB": 5 * 10**9, "200MB": 2 * 10**8, " 1.5 kb ": 1500, "2TB": 2 * 10**12, "7": 7, 123: 123}
    assert {text: parse_size(text) for text in sizes} == sizes
    for text in ("", "GB", "5G", "5GiB", "-1", "-5GB", "0", "0.4", "1e9", "nan", "inf", "5 5GB", "٥GB", -1, 0, None):
        with pytest.raises(UserError, match="max-shard-size: expected bytes"):
            parse_size(text)


def test_one_tensor_at_a_time(tmp_path):
    specs = {f"t{i}": (torch.float32, (3, 5)) for i in range(7)}
    alive, asked, done = weakref.WeakSet(), [], []

    def read(name):
        assert not alive
        asked.append(name)
        tensor = torch.full((5, 3), float(name[1])).t().requires_grad_()
        alive.add(tensor)
        return tensor

    plan = plan_by_size(dict(reversed(specs.items())), 150)
    write_shards(tmp_path, plan, read, done.append)
    assert asked == ["t5", "t6", "t3", "t4", "t1", "t2", "t0"]  # two to a file
    assert done == [60] * 7 and sum(done) == plan.total_bytes
    for file, shard in plan.files.items():
        for name, tensor in safetensors.torch.load_file(tmp_path / file).items():
            assert name in shard and torch.equal(tensor, torch.full((3, 5), float(name[1])))


def test_what_does_not_fit_the_plan_is_an_error(tmp_path):
    for i, tensor in enumerate((torch.ones(2, 3), torch.ones(6, dtype=torch.float16), torch.ones(5))):
        (tmp_path / str(i)).mkdir()
        with pytest.raises(ValueError, match="a: planned"):
            write_shards(tmp_path / str(i), plan_by_size({"a": (torch.float32, (6,))}), lambda name, t=tensor: t)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("size", [3, 1 << 20])
def test_a_full_disk_is_an_os_error(monkeypatch, size):
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda path, mode: opened(Path("/dev/full"), mode.replace("x", "w")))
    plan = plan_by_size({"a": (torch.uint8, (size,))})
    with pytest.raises(OSError, match="No space left"):
        write_shards(Path("nowhere"), plan, lambda name: torch.ones(size, dtype=torch.uint8))
