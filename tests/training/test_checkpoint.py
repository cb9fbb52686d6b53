"""Checkpoints that are damaged, hostile, or not what was asked for; one process, real files."""

import io
import json
import pickle
import shutil
import zlib

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megatron_safe.config import ModelConfig, OptimizerConfig
from megatron_safe.errors import UserError
from megatron_safe.models.roles import Role
from megatron_safe.training import checkpoint
from megatron_safe.training.pickles import check_index
from megatron_safe.training.setup import resolve_model

VOCABULARY = 11
MODEL = ModelConfig(
    num_layers=1, hidden_size=16, ffn_hidden_size=16, num_attention_heads=2, max_sequence_length=16, vocab_multiple=8
)


@pytest.fixture(scope="module")
def actor(runtime):
    return Role("actor", MODEL, runtime, VOCABULARY, "fp32", 0, OptimizerConfig(), 10)


@pytest.fixture(scope="module")
def saved(actor, runtime, tmp_path_factory):
    """A run folder with checkpoints of steps 1, 2 and 3, not to be touched."""
    run = tmp_path_factory.mktemp("saved")
    for step in (1, 2, 3):
        checkpoint.save(run, step, [actor], {"at": step}, 5, runtime, keep_last=0)
    return run


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def newest(run):
    return run / "checkpoints" / "step_00000003"


def weights_of(role) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in role.module.state_dict().items() if torch.is_tensor(value)}


def rewrite(file, content: bytes) -> None:
    """Change a file as someone who means harm would: the manifest agrees."""
    file.write_bytes(content)
    folder = next(parent for parent in file.parents if (parent / "manifest.json").exists())
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest[str(file.relative_to(folder))] = {"bytes": len(content), "crc32": zlib.crc32(content)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


# Damage.


def truncate(folder):
    file = max((folder / "weights").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-7])
    return file, "bytes, found"


def flip_a_byte(folder):
    file = max((folder / "weights").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return file, "checksum differs"


def remove_weights(folder):
    file = min((folder / "weights").glob("*.distcp"))
    file.unlink()
    return file, "missing"


def remove_index(folder):
    (folder / "weights" / ".metadata").unlink()
    return folder / "weights" / ".metadata", "missing"


def remove_state(folder):
    (folder / "state.json").unlink()
    return folder / "state.json", "missing"


def remove_manifest(folder):
    (folder / "manifest.json").unlink()
    return folder / "manifest.json", "No such file"


def empty_manifest(folder):
    (folder / "manifest.json").write_text("{}")
    return folder / "manifest.json", "expected state.json to be listed, found nothing"


def manifest_of_another_kind(folder):
    (folder / "manifest.json").write_text('["state.json"]')
    return folder / "manifest.json", "expected size and CRC-32 of every file"


def half_a_manifest(folder):
    file = folder / "manifest.json"
    file.write_text(file.read_text()[:40])
    return file, "expected size and CRC-32 of every file"


def other_format(folder):
    content = json.loads((folder / "state.json").read_text()) | {"format": 99}
    rewrite(folder / "state.json", json.dumps(content).encode())
    return folder / "state.json", "expected format 1, found 99"


def state_without_roles(folder):
    content = json.loads((folder / "state.json").read_text())
    del content["roles"]
    rewrite(folder / "state.json", json.dumps(content).encode())
    return folder / "state.json", "KeyError('roles')"


def state_of_another_kind(folder):
    rewrite(folder / "state.json", b"[]")
    return folder / "state.json", "expected a checkpoint's state"


DAMAGES = [
    truncate, flip_a_byte, remove_weights, remove_index, remove_state, remove_manifest, empty_manifest,
    manifest_of_another_kind, half_a_manifest, other_format, state_without_roles, state_of_another_kind,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_by_name_where_the_checkpoint_is_named(run, runtime, damage):
    file, what = damage(newest(run))
    with pytest.raises(UserError) as error:
        checkpoint.find(newest(run), runtime)
    assert str(file) in str(error.value) and what in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_folder_falls_back_to_the_last_good_checkpoint(run, runtime, damage, capfd):
    file, what = damage(newest(run))
    found = checkpoint.find(run, runtime)
    assert (found.step, found.seed, found.state) == (2, 5, {"at": 2})
    printed = capfd.readouterr().out
    assert str(file) in printed and what in printed


def test_the_newest_is_used_where_all_is_well(run, runtime, capfd):
    assert checkpoint.find(run, runtime).step == 3
    assert checkpoint.find(newest(run).parent / "step_00000001", runtime).step == 1
    assert capfd.readouterr().out == ""


def test_two_damaged_ones_are_passed_over_and_three_are_too_many(run, runtime):
    truncate(newest(run))
    remove_manifest(run / "checkpoints" / "step_00000002")
    assert checkpoint.find(run, runtime).step == 1
    first, _ = flip_a_byte(run / "checkpoints" / "step_00000001")
    with pytest.raises(UserError, match="no good checkpoint is left"):
        checkpoint.find(run, runtime)


@pytest.mark.parametrize("place", ["nowhere", "empty"])
def test_no_checkpoint_at_all(tmp_path, runtime, place):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="expected a checkpoint or a run folder with one"):
        checkpoint.find(tmp_path / place, runtime)


# Saving.


def test_what_is_saved_comes_back(run, actor, runtime):
    wanted = weights_of(actor)
    other = Role("actor", MODEL, runtime, VOCABULARY, "fp32", 77)
    name = "embedding.word_embeddings.weight"
    assert not torch.equal(weights_of(other)[name], wanted[name])
    checkpoint.load_weights(other, checkpoint.find(run, runtime))
    found = weights_of(other)
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_only_the_newest_stay(run, actor, runtime):
    checkpoint.save(run, 4, [actor], {}, 5, runtime, keep_last=2)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000003", "step_00000004"]


def test_damaged_later_ones_do_not_push_out_good_ones(run, actor, runtime):
    """Steps 2 and 3 are damaged, the run goes on from 1 and saves 2: the good ones are 1 and 2."""
    truncate(newest(run))
    truncate(run / "checkpoints" / "step_00000002")
    checkpoint.save(run, 2, [actor], {"again": True}, 5, runtime, keep_last=2)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000001", "step_00000002"]
    assert checkpoint.find(run, runtime).state == {"again": True}


def test_leftovers_of_a_crash_are_ignored_and_cleared(run, actor, runtime):
    for step in (4, 9):
        leftover = run / "checkpoints" / f".step_{step:08d}.tmp"
        (leftover / "weights").mkdir(parents=True)
        (leftover / "weights" / "__0_0.distcp").write_bytes(b"half a tensor")
    (run / "checkpoints" / ".step_00000009.tmp" / "state.json").write_text("{}")
    assert checkpoint.find(run, runtime).step == 3
    published = checkpoint.save(run, 4, [actor], {}, 5, runtime, keep_last=0)
    assert checkpoint.find(published, runtime).step == 4
    assert not list((run / "checkpoints").glob(".*"))


@pytest.mark.parametrize("culprit", ["describe", "publish", "weights"])
def test_a_failed_save_publishes_nothing(run, actor, runtime, monkeypatch, culprit):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    if culprit == "describe":
        monkeypatch.setattr(checkpoint, "write_state", full)
    elif culprit == "publish":
        monkeypatch.setattr(checkpoint, "sync", full)
    else:
        from megatron.core.dist_checkpointing.strategies import filesystem_async

        monkeypatch.setattr(filesystem_async, "_write_item", full)
    with pytest.raises(OSError, match="No space left on device"):
        checkpoint.save(run, 4, [actor], {}, 5, runtime, keep_last=1)
    monkeypatch.undo()
    assert [path.name for path in sorted((run / "checkpoints").glob("step_*"))] == [
        "step_00000001", "step_00000002", "step_00000003",
    ]  # fmt: skip
    assert checkpoint.find(run, runtime).step == 3
    checkpoint.save(run, 4, [actor], {}, 5, runtime, keep_last=1)
    assert checkpoint.find(run, runtime).step == 4


def test_a_save_that_fails_on_one_rank_fails_on_all(torchrun, tmp_path):
    torchrun(2, "failing_save.py", str(tmp_path))
    for rank in (0, 1):
        first, second, third = (tmp_path / f"rank{rank}.txt").read_text().splitlines()
        assert first.startswith("nothing: OSError ") and "weights could not be written" in first
        assert second.startswith("nothing: OSError ") and "No space left on device" in second
        assert third == "published: saved"


# Hostile files.


class Harm:
    """Its pickle writes a file when it is loaded."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return exec, (f"open({str(self.target)!r}, 'w')",)


def harmful_pickles(target) -> dict[str, bytes]:
    index = pickle.dumps(Harm(target), protocol=4)
    text = str(target).encode()
    return {
        "the global builtins.exec": index,
        "opcode GLOBAL": pickle.dumps(Harm(target), protocol=2),
        "opcode INST": b"(S'" + text + b"'\nibuiltins\nopen\n.",
        "opcode EXT1": b"\x80\x04\x82\x01.",
        "opcode PERSID": b"P1\n.",
        # Names put where a scan that only looks back over texts would not find them.
        "opcode DUP": b"\x80\x04\x8c\x08builtins\x8c\x04exec2\x93.",
        "the global torch.Size": b"\x80\x04\x8c\x08builtins\x94\x8c\x04exec\x94\x8c\x05torch\x8c\x04Size0h\x01\x93.",
    }


def test_the_indexes_in_this_file_would_do_harm(tmp_path):
    """Else the test below shows nothing."""
    pickle.loads(harmful_pickles(tmp_path / "harm")["the global builtins.exec"])
    assert (tmp_path / "harm").exists()


@pytest.mark.parametrize("what", harmful_pickles("x"))
def test_an_index_that_runs_code_is_refused_unread(run, actor, runtime, tmp_path, what):
    index = newest(run) / "weights" / ".metadata"
    rewrite(index, harmful_pickles(tmp_path / "harm")[what])
    found = checkpoint.find(newest(run), runtime)  # whole, as far as the manifest goes
    for load in (lambda: checkpoint.load_weights(actor, found), lambda: checkpoint.load_training([actor], found)):
        with pytest.raises(UserError) as error:
            load()
        assert str(index) in str(error.value)
    assert not (tmp_path / "harm").exists()
    if what.startswith("the global builtins"):
        assert what in str(error.value)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x04\x8c\xffabc", b"\x80\x04h\x05."])
def test_an_index_that_is_no_pickle(tmp_path, content):
    file = tmp_path / ".metadata"
    file.write_bytes(content)
    with pytest.raises(UserError, match="refusing to load it"):
        check_index(file)


def test_harm_hidden_in_a_real_index_is_found(saved, tmp_path):
    metadata = pickle.loads((newest(saved) / "weights" / ".metadata").read_bytes())
    metadata.planner_data = [1, {"deep": (Harm(tmp_path / "harm"),)}]
    file = tmp_path / ".metadata"
    file.write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="the global builtins.exec"):
        check_index(file)
    check_index(newest(saved) / "weights" / ".metadata")


@pytest.mark.parametrize("kind", ["object", "tensor"])
def test_objects_among_the_weights_run_no_code(run, runtime, tmp_path, kind):
    """What is not a tensor torch would unpickle without asking, and the index says what is none."""
    victim = Role("actor", MODEL, runtime, VOCABULARY, "fp32", 0)
    folder = newest(run) / "weights"
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    key = next(
        key for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, BytesStorageMetadata) == (kind == "object")
    )  # fmt: skip
    metadata.state_dict_metadata[key] = BytesStorageMetadata()
    place = next(index for index in metadata.storage_data if index.fqn == key)
    info = metadata.storage_data.pop(place)
    metadata.storage_data[MetadataIndex(key)] = info
    file = folder / info.relative_path
    content, harmful = file.read_bytes(), io.BytesIO()
    torch.save(Harm(tmp_path / "harm"), harmful)
    info.offset, info.length = len(content), len(harmful.getvalue())
    rewrite(file, content + harmful.getvalue())
    rewrite(folder / ".metadata", pickle.dumps(metadata))
    with pytest.raises(UserError, match="Weights only load failed" if kind == "object" else "BytesStorageMetadata"):
        checkpoint.load_weights(victim, checkpoint.find(newest(run), runtime))
    assert not (tmp_path / "harm").exists()


def test_harm_in_the_common_file_is_refused(run, actor, runtime, tmp_path):
    torch.save({"wanted": Harm(tmp_path / "harm")}, tmp_path / "common.pt")
    rewrite(newest(run) / "weights" / "common.pt", (tmp_path / "common.pt").read_bytes())
    with pytest.raises(UserError, match="expected tensors and plain data"):
        checkpoint.load_weights(actor, checkpoint.find(newest(run), runtime))
    assert not (tmp_path / "harm").exists()


# Not what was asked for.


class Vocabulary:
    """As much of a tokenizer as a model is checked against."""

    def __init__(self, size):
        self.vocab_size = size


def test_another_vocabulary(run, runtime):
    with pytest.raises(UserError, match="expected the tokenizer's vocabulary of 12 tokens, found a model of 11"):
        resolve_model(ModelConfig(checkpoint=str(run)), "actor", Vocabulary(12), runtime)


def test_the_architecture_is_the_checkpoints(run, runtime):
    given = ModelConfig(checkpoint=str(run), hidden_size=999)
    plan = resolve_model(given, "reward_model", Vocabulary(VOCABULARY), runtime)
    assert (plan.model.hidden_size, plan.model.num_layers, plan.source.step) == (16, 1, 3)
    assert plan.vocab_size == VOCABULARY and not plan.trained
    assert resolve_model(given, "actor", Vocabulary(VOCABULARY), runtime).trained


@pytest.mark.parametrize("role", ["reward_critic", "cost_critic"])
def test_no_role_to_start_from(run, runtime, role):
    wanted = f"{role} or {role.replace('critic', 'model')} or score"
    with pytest.raises(UserError, match=f"expected {wanted} to start {role} from, found actor"):
        resolve_model(ModelConfig(checkpoint=str(run)), role, Vocabulary(VOCABULARY), runtime)


def test_a_reward_model_takes_the_trunk_and_keeps_its_head(run, actor, runtime):
    role = Role("reward_model", MODEL, runtime, VOCABULARY, "fp32", 77)
    head = role.module.output_layer.weight.clone()
    checkpoint.load_weights(role, checkpoint.find(run, runtime))
    found, wanted = weights_of(role), weights_of(actor)
    trunk = [name for name in wanted if not name.startswith("output_layer")]
    assert len(trunk) >= 6 and all(torch.equal(found[name], wanted[name]) for name in trunk)
    assert torch.equal(found["output_layer.weight"], head) and head.abs().sum() > 0
