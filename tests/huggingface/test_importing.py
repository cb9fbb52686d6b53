"""A Hugging Face folder becomes one of our checkpoints: the same numbers, little memory, whole or not at all."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from whole_rows import outputs

from megatron_safe.config import ModelConfig
from megatron_safe.errors import UserError
from megatron_safe.huggingface import loading
from megatron_safe.huggingface.distcp import Reader
from megatron_safe.huggingface.importing import Import, narrowed
from megatron_safe.huggingface.loading import HuggingFaceModel
from megatron_safe.models.roles import Role
from megatron_safe.training import checkpoint


@pytest.fixture
def folder(models, tmp_path):
    """A Llama that may be spoilt."""
    return shutil.copytree(models("llama").folder, tmp_path / "folder")


def checkpoint_of(run: Path) -> Path:
    return run / "checkpoints" / "step_00000000"


def role_from(run: Path, runtime, name: str) -> Role:
    """Built as a stage builds it from a checkpoint, with NaN in place of fresh weights."""
    found = checkpoint.find(run, runtime)
    (saved,) = found.roles.values()
    role = Role(name, ModelConfig(**saved["model"]), runtime, saved["vocab_size"], "fp32", 0)
    fill_with_nan(role)
    checkpoint.load_weights(role, found)
    return role


@torch.no_grad()
def fill_with_nan(role: Role) -> None:
    for parameter in role.module.parameters():
        parameter.fill_(torch.nan)


def rewrite(file: Path, change) -> None:
    """Change some of the tensors of a safetensors file."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def shard_with(folder: Path, name: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][name]


@pytest.mark.parametrize(
    "kind",
    [
        "llama", "llama-tied", "mistral", "qwen2", "qwen2-tied", "qwen3", "llama-judge", "llama-score",
        "llama-score-normalized",
    ],
)  # fmt: skip
def test_a_role_computes_what_transformers_does(models, runtime, tmp_path, tokens_BS, kind):
    saved = models(kind)
    found = Import.of(saved.folder)
    found.write(tmp_path / "run")
    scalar = saved.language is None
    assert found.role == ("score" if scalar else "actor")
    role = role_from(tmp_path / "run", runtime, "reward_model" if scalar else "actor")
    with torch.no_grad():
        output = outputs(role.module, tokens_BS)
    expected = saved.output(tokens_BS)
    assert expected.std() > 0.3
    torch.testing.assert_close(output if scalar else output[..., : role.vocab_size], expected, rtol=0, atol=1e-4)
    # Bit for bit what a config gets that names the folder itself.
    direct = Role(role.name, role.model, runtime, role.vocab_size, "fp32", 0)
    fill_with_nan(direct)
    loading.load_weights(direct.module, role.model.vocab_multiple, HuggingFaceModel.open(saved.folder))
    for (name, one), other in zip(role.module.named_parameters(), direct.module.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_reward_model_starts_from_an_imported_language_model(models, runtime, tmp_path):
    Import.of(models("llama").folder).write(tmp_path / "run")
    role = Role("reward_model", role_from(tmp_path / "run", runtime, "actor").model, runtime, 131, "fp32", 3)
    head = role.module.output_layer.weight.clone()
    checkpoint.load_weights(role, checkpoint.find(tmp_path / "run", runtime))
    assert torch.equal(role.module.output_layer.weight, head)
    assert torch.equal(role.module.decoder.final_layernorm.weight, models("llama").trunk.norm.weight)


def test_what_is_written_is_a_checkpoint_like_any_other(models, runtime, tmp_path):
    Import.of(models("llama-score").folder).write(tmp_path / "run")
    found = checkpoint.find(tmp_path / "run", runtime)  # verifies every checksum
    assert (found.path, found.step, found.seed, found.state) == (checkpoint_of(tmp_path / "run"), 0, 0, {})
    assert found.roles["score"]["vocab_size"] == 131
    names = {str(path.relative_to(found.path)) for path in found.path.rglob("*") if path.is_file()}
    listed = json.loads((found.path / "manifest.json").read_text()).keys()
    assert names == listed | {"manifest.json"}
    kept = {"README.md", "config.json", "tokenizer.json"}
    assert {path.name for path in (found.path / "huggingface" / "score").iterdir()} == kept | {"weights.json"}
    for name in kept:
        path = found.path / "huggingface" / "score" / name
        assert path.read_bytes() == (models("llama-score").folder / name).read_bytes()
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]


def test_it_does_not_grow_from_its_own_kind(models, runtime, tmp_path):
    """Saved once more by training, it holds the same keys and numbers."""
    Import.of(models("qwen3").folder).write(tmp_path / "run")
    role = role_from(tmp_path / "run", runtime, "actor")
    again = checkpoint.save(tmp_path / "again", 1, [role], {}, 0, runtime, keep_last=0)
    one, other = Reader(checkpoint_of(tmp_path / "run") / "weights"), Reader(again / "weights")
    assert sorted(one.keys()) == sorted(other.keys())
    for key in one.keys():
        assert torch.equal(one.read(key), other.read(key)), key


def test_padding_of_the_vocabulary_is_zero(models, tmp_path):
    Import.of(models("llama").folder).write(tmp_path / "run")
    reader = Reader(checkpoint_of(tmp_path / "run") / "weights")
    for key in ("actor.embedding.word_embeddings.weight", "actor.output_layer.weight"):
        rows = reader.read(key)
        assert rows.shape == (256, 32) and not rows[131:].any() and rows[:131].all(dim=1).any()


def test_fused_tensors_of_several_types_are_stored_in_the_widest(folder, tmp_path):
    key, value = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "kv")
    for name, dtype in ((key, torch.bfloat16), (value, torch.float16)):
        def change(tensors, name=name, dtype=dtype):
            tensors[name] = tensors[name].to(dtype)

        rewrite(shard_with(folder, name), change)
    found = Import.of(folder)
    assert found.types["decoder.layers.self_attention.linear_qkv.weight"] == torch.float32
    found.write(tmp_path / "run")
    reader = Reader(checkpoint_of(tmp_path / "run") / "weights")
    # Two groups of two query heads of 8 rows, then the key, then the value.
    fused = reader.read("actor.decoder.layers.self_attention.linear_qkv.weight", 1)
    weights = load_file(shard_with(folder, key)) | load_file(shard_with(folder, value))
    assert torch.equal(fused[16:24], weights[key][:8].float()) and torch.equal(fused[56:64], weights[value][8:].float())


def test_all_weights_in_another_type(models, tmp_path):
    found = Import.of(models("llama").folder, torch.bfloat16)
    found.write(tmp_path / "run")
    reader = Reader(checkpoint_of(tmp_path / "run") / "weights")
    assert {reader.dtype(key) for key in reader.keys()} == {torch.bfloat16}
    expected = models("llama").weights()["model.layers.1.mlp.up_proj.weight"].bfloat16()
    assert torch.equal(reader.read("actor.decoder.layers.mlp.linear_fc1.weight", 1)[44:], expected)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.k_proj.weight"])
def test_numbers_that_do_not_fit_are_not_made_infinite(folder, tmp_path, name):
    rewrite(shard_with(folder, name), lambda tensors: tensors[name].view(-1)[3:4].fill_(7e4))
    Import.of(folder, torch.bfloat16).write(tmp_path / "wide")
    with pytest.raises(UserError, match="expected numbers that fit float16, found up to 7e\\+04"):
        Import.of(folder, torch.float16).write(tmp_path / "narrow")
    assert not (tmp_path / "narrow").exists()
    already = torch.tensor([torch.inf, torch.nan, 1.0])
    assert torch.equal(narrowed(already, torch.float16, "x").isfinite(), already.isfinite())


def test_a_weight_that_is_a_whole_number(folder):
    def change(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)

    rewrite(shard_with(folder, "model.norm.weight"), change)
    with pytest.raises(UserError, match="'model.norm.weight': expected floating point, found int8"):
        Import.of(folder)


# Whole or not at all.


@pytest.mark.parametrize("make", ["empty folder", "nothing", "folders above"])
def test_outputs_that_are_accepted(models, tmp_path, make):
    out = tmp_path / "new" / "er" if make == "folders above" else tmp_path / "out"
    if make == "empty folder":
        out.mkdir()
    (tmp_path / ".out.converting").mkdir()  # of a process that was killed
    (tmp_path / ".out.converting" / "half").write_text("written")
    Import.of(models("llama").folder).write(out)
    assert checkpoint_of(out).is_dir()


@pytest.mark.parametrize("what", ["folder in use", "file", "under a file"])
def test_outputs_that_are_refused(models, tmp_path, what):
    out = tmp_path / "out"
    if what == "folder in use":
        out.mkdir()
        (out / "precious").write_text("work")
    else:
        out.write_text("work")
        out = out / "below" if what == "under a file" else out
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="expected a (new or an empty )?folder, found"):
        Import.of(models("llama").folder).write(out)
    assert sorted(tmp_path.rglob("*")) == before


def test_too_small_a_disk_is_seen_beforehand(models, tmp_path):
    class Huge(Import):
        total_bytes = 2 * shutil.disk_usage(tmp_path).free

    found = Import.of(models("llama").folder)
    with pytest.raises(UserError, match="GB of free disk, found"):
        Huge(found.model, found.types).write(tmp_path / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("when", [0, 7, 14])
def test_an_interrupt_leaves_nothing(models, tmp_path, when):
    calls = []

    def progress(count):
        calls.append(count)
        if len(calls) > when:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Import.of(models("llama").folder).write(tmp_path / "out", progress)
    assert not any(tmp_path.iterdir())


def test_a_folder_that_shrinks_while_it_is_read_leaves_nothing(folder, tmp_path):
    found = Import.of(folder)
    file = shard_with(folder, "lm_head.weight")
    os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(UserError, match="found its end"):
        found.write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == [folder]


def test_progress_adds_up(models, tmp_path):
    found, counts = Import.of(models("qwen2").folder), []
    found.write(tmp_path / "out", counts.append)
    assert sum(counts) == found.total_bytes
    reader = Reader(checkpoint_of(tmp_path / "out") / "weights")
    assert found.total_bytes == sum(reader.read(key).nbytes for key in reader.keys())


# Memory.

PEAK = """
import sys
from pathlib import Path
from megatron_safe.huggingface.importing import Import

def memory(name):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(name)]
    return 1024 * int(line.split()[1])

found = Import.of(Path(sys.argv[1]))
open("/proc/self/clear_refs", "w").write("5")  # forgets the peak of the imports
before = memory("VmRSS")
found.write(Path(sys.argv[2]))
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_little_memory(tmp_path):
    """Of 212 MB the largest tensor has 33 and a layer 21: no more than that is ever held."""
    h, f, V, layers = 1024, 2048, 16_000, 7
    folder = tmp_path / "folder"
    folder.mkdir()
    config = dict(
        architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=h, intermediate_size=f, vocab_size=V,
        num_hidden_layers=layers, num_attention_heads=8, max_position_embeddings=64, rms_norm_eps=1e-5,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (V, h), "model.norm.weight": (h,), "lm_head.weight": (V, h)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.self_attn.{name}_proj.weight": (h, h) for name in "qkvo"}
        shapes |= {f"model.layers.{layer}.mlp.{name}_proj.weight": (f, h) for name in ("gate", "up")}
        shapes[f"model.layers.{layer}.mlp.down_proj.weight"] = (h, f)
        shapes |= {f"model.layers.{layer}.{name}_layernorm.weight": (h,) for name in ("input", "post_attention")}
    tensors = {name: torch.full(shape, 0.5, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    layer = sum(value.nbytes for name, value in tensors.items() if ".layers.0." in name)
    largest = max(value.nbytes for value in tensors.values())
    assert sum(value.nbytes for value in tensors.values()) > 3 * (largest + layer)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(folder), str(tmp_path / "out")],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < largest + layer
