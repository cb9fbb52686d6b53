"""Our checkpoints become Hugging Face folders: what came from one leaves to the bit, what did not loads as well."""

import json
import math
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import sentencepiece
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from whole_rows import outputs

from megatron_safe.config import ModelConfig
from megatron_safe.errors import UserError
from megatron_safe.huggingface.exporting import Export
from megatron_safe.huggingface.importing import Import
from megatron_safe.huggingface.loading import HuggingFaceModel
from megatron_safe.models.llama import architecture
from megatron_safe.models.roles import Role
from megatron_safe.training import checkpoint

VOCABULARY = 131
MODEL = ModelConfig(
    num_layers=2, hidden_size=32, ffn_hidden_size=44, num_attention_heads=4, num_query_groups=2,
    max_sequence_length=64, vocab_multiple=16, init_std=0.2,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A folder with a tokenizer.json of 131 words, and nothing that says which are special."""
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    made = Tokenizer(tokenizer_models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.Fuse()
    made.add_special_tokens(words[:3])
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def folder(models, tmp_path):
    """A Llama that may be changed."""
    return shutil.copytree(models("llama").folder, tmp_path / "folder")


@pytest.fixture
def imported(models, tmp_path) -> Path:
    """The checkpoint of an imported Llama, to be spoilt."""
    Import.of(models("llama").folder).write(tmp_path / "run")
    return tmp_path / "run" / "checkpoints" / "step_00000000"


def export_of(run: Path, role: str | None = None, **options) -> Export:
    """Of a checkpoint or a run folder with one; by default of its only role."""
    path = run if (run / "state.json").exists() else next((run / "checkpoints").iterdir())
    found = checkpoint.Checkpoint.read(path)
    role = role or next(iter(found.roles))
    return Export.of(path, role, found.roles[role], **options)


def there_and_back(folder: Path, tmp_path: Path, **options) -> Path:
    Import.of(folder).write(tmp_path / "there")
    export_of(tmp_path / "there", **options).write(tmp_path / "back")
    return tmp_path / "back"


def in_types(folder: Path, types: list[torch.dtype]) -> None:
    """Its floating-point tensors in other types, at random."""
    draw = random.Random(0)
    for file in folder.glob("*.safetensors"):
        tensors = {name: value.to(draw.choice(types)) for name, value in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@torch.no_grad()
def output_of(role: Role, tokens_BS: torch.Tensor) -> torch.Tensor:
    output = outputs(role.module, tokens_BS)
    return output if role.module.head == "scalar" else output[..., : role.vocab_size]


@torch.no_grad()
def stir(role: Role, seed: int = 0) -> Role:
    """Every weight moved, norms and biases too."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in role.module.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return role


# What came from Hugging Face.


@pytest.mark.parametrize(
    "kind",
    [
        "llama", "llama-tied", "mistral", "qwen2", "qwen2-tied", "qwen3", "llama-judge", "llama-score",
        "llama-score-normalized",
    ],
)  # fmt: skip
def test_what_was_imported_leaves_to_the_byte(models, tmp_path, same_files, kind):
    folder = models(kind).folder
    assert "score" in kind or len(list(folder.glob("*.safetensors"))) > 2
    same_files(folder, there_and_back(folder, tmp_path))


@pytest.mark.parametrize("types", [[torch.bfloat16], [torch.float16], [torch.bfloat16, torch.float16, torch.float32]])
def test_every_type_and_mixtures(folder, tmp_path, same_files, types):
    in_types(folder, types)
    same_files(folder, there_and_back(folder, tmp_path))


def test_every_bit_pattern_of_a_type(folder, tmp_path, same_files):
    """Subnormal numbers, infinities and NaN with what they carry; types do not change on the way."""
    generator = torch.Generator().manual_seed(0)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name, value in tensors.items():
            bits = torch.randint(-(2**15), 2**15, value.shape, dtype=torch.int16, generator=generator)
            tensors[name] = bits.view(torch.bfloat16)
        save_file(tensors, file, metadata={"format": "pt"})
    same_files(folder, there_and_back(folder, tmp_path))


def test_a_head_that_is_listed_though_it_is_tied(models, tmp_path, same_files):
    folder = shutil.copytree(models("llama-tied").folder, tmp_path / "folder")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"]["model.norm.weight"]
    tensors = load_file(file) | {"lm_head.weight": weights_of(folder)["model.embed_tokens.weight"].clone()}
    save_file(tensors, file, metadata={"format": "pt"})
    index["weight_map"]["lm_head.weight"] = file.name
    index["weight_map"] = dict(sorted(index["weight_map"].items()))
    index["metadata"]["total_size"] += tensors["lm_head.weight"].nbytes
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    same_files(folder, there_and_back(folder, tmp_path))

    tensors["lm_head.weight"][7, 3] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="expected lm_head.weight to equal model.embed_tokens.weight"):
        Import.of(folder)


def test_an_old_bin_becomes_safetensors_with_the_same_tensors(models, tmp_path):
    folder = shutil.copytree(models("llama").folder, tmp_path / "folder")
    weights = weights_of(folder)
    for file in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        file.unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    back = there_and_back(folder, tmp_path)
    assert {path.name for path in back.iterdir()} >= {"model.safetensors", "config.json", "README.md"}
    found = load_file(back / "model.safetensors")
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)


def test_all_weights_in_another_type(models, tmp_path):
    folder = models("llama").folder
    back = there_and_back(folder, tmp_path, dtype=torch.bfloat16)
    weights, found = weights_of(folder), weights_of(back)
    assert all(torch.equal(found[name], weights[name].bfloat16()) for name in weights)
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, back))
    assert before.pop("dtype") == "float32" and after.pop("dtype") == "bfloat16" and before == after
    assert list(before) == list(after)
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in found.values())
    for name in ("generation_config.json", "tokenizer.json", "README.md"):
        assert (back / name).read_bytes() == (folder / name).read_bytes()


def test_the_type_it_has_already_changes_nothing(models, tmp_path, same_files):
    same_files(models("llama").folder, there_and_back(models("llama").folder, tmp_path, dtype=torch.float32))


def test_other_shards(models, tmp_path):
    folder = models("llama").folder
    back = there_and_back(folder, tmp_path, max_shard_size="1MB")
    assert not (back / "model.safetensors.index.json").exists()
    found, weights = load_file(back / "model.safetensors"), weights_of(folder)
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)


def test_trained_weights_leave_under_the_same_names(models, made):
    folder = models("llama").folder
    for name in ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json"):
        assert (made["trained actor"].out / name).read_bytes() == (folder / name).read_bytes()


def test_a_reward_model_that_began_as_a_language_model(models, made):
    out = made["trained reward_model"].out
    before, after = (json.loads((path / "config.json").read_text()) for path in (models("llama").folder, out))
    assert after["architectures"] == ["LlamaForScore"] and after["score_type"] == "reward"
    assert after["rope_parameters"] == before["rope_parameters"] and after["vocab_size"] == VOCABULARY
    names = weights_of(out).keys()
    assert "score_head.weight" in names and "lm_head.weight" not in names
    assert Import.of(out).role == "score"


def test_four_ranks_load_what_was_imported_and_save_what_leaves_to_the_byte(models, tmp_path, torchrun, same_files):
    kinds = ("llama", "qwen2-tied", "qwen3", "llama-score-normalized")
    for kind in kinds:
        Import.of(models(kind).folder).write(tmp_path / kind)
    torchrun(4, "pass_through.py", "2", "2", *(str(tmp_path / kind) for kind in kinds))
    for kind in kinds:
        export_of(tmp_path / f"{kind}-again").write(tmp_path / f"{kind}-back")
        same_files(models(kind).folder, tmp_path / f"{kind}-back")


def test_a_normalizer_stays_with_a_model_that_is_trained_on(models, runtime, tmp_path):
    Import.of(models("llama-score-normalized").folder).write(tmp_path / "run")
    found = checkpoint.find(tmp_path / "run", runtime)
    model = ModelConfig(**found.roles["score"]["model"])
    assert model.score_mean == pytest.approx(0.7) and model.score_std == pytest.approx(math.sqrt(2.5))
    origin = HuggingFaceModel.open(models("llama-score-normalized").folder).origin
    role = Role("reward_model", model, runtime, VOCABULARY, "fp32", 1, origin=origin)
    path = checkpoint.save(tmp_path / "trained", 1, [role], {}, 0, runtime, keep_last=0)
    export_of(path).write(tmp_path / "out")
    assert architecture(HuggingFaceModel.open(tmp_path / "out").description.model) == architecture(model)
    before, after = weights_of(models("llama-score-normalized").folder), weights_of(tmp_path / "out")
    assert torch.equal(before["normalizer.var"], after["normalizer.var"]) and before.keys() == after.keys()
    assert torch.equal(after["score_head.weight"], role.module.output_layer.weight)


# What never came from Hugging Face.


NEW = {
    "llama": ("LlamaForCausalLM", dict()),
    "llama-tied": ("LlamaForCausalLM", dict(tie_embeddings=True, rope_type="linear", rope_factor=3.0)),
    "llama-3": ("LlamaForCausalLM", dict(
        head_dim=10, rope_type="llama3", rope_factor=8.0, rope_original_max_position=32, norm_epsilon=1e-3,
    )),
    "mistral": ("MistralForCausalLM", dict(sliding_window=7)),
    "qwen2": ("Qwen2ForCausalLM", dict(qkv_bias=True, num_query_groups=None)),
    "qwen3": ("Qwen3ForCausalLM", dict(qk_norm=True, tie_embeddings=True)),
    "qwen3-window": ("Qwen3ForCausalLM", dict(qk_norm=True, sliding_window=5)),
}  # fmt: skip
SCORES = {
    "reward": ("reward_model", dict(), "LlamaForScore", "reward"),
    "cost": ("cost_model", dict(), "LlamaForScore", "cost"),
    "critic": ("reward_critic", dict(qkv_bias=True), "Qwen2ForScore", "critic"),
    "normalized": ("cost_model", dict(score_mean=0.5, score_std=2.0), "LlamaForScore", "reward"),
    "judge": ("reward_model", dict(score_bias=False), "LlamaForSequenceClassification", None),
}


@dataclass
class Made:
    """A role, the checkpoint and the folder that were made of it, and what `transformers` makes of that."""

    role: Role
    checkpoint: Path
    out: Path
    output: torch.Tensor | None = None
    facts: dict | None = None


@pytest.fixture(scope="module")
def made(runtime, models, tokenizer, tokens_BS, tmp_path_factory) -> dict[str, Made]:
    """A model of each kind: new ones, and two that were trained from a Hugging Face Llama."""
    root, found = tmp_path_factory.mktemp("made"), {}

    def make(name: str, role: str, model: ModelConfig, origin=None) -> None:
        built = stir(Role(role, model, runtime, VOCABULARY, "fp32", 1, origin=origin), len(found))
        path = checkpoint.save(root / f"{name} run", 3, [built], {}, 0, runtime, keep_last=0)
        export_of(path, tokenizer=None if origin else tokenizer).write(root / name)
        found[name] = Made(built, path, root / name)

    for name, (_, fields) in NEW.items():
        make(name, "actor", ModelConfig(**vars(MODEL) | fields))
    for name, (role, fields, _, _) in SCORES.items():
        make(name, role, ModelConfig(**vars(MODEL) | fields))
    source = HuggingFaceModel.open(models("llama").folder)
    for role in ("actor", "reward_model"):
        make(f"trained {role}", role, source.description.model, source.origin)

    plan = root / "plan.json"
    folders = {name: str(each.out) for name, each in found.items()}
    plan.write_text(json.dumps({"folders": folders, "tokens": tokens_BS.tolist()}))
    program = Path(__file__).parents[1] / "programs" / "load_transformers.py"
    done = subprocess.run([sys.executable, str(program), str(plan)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    outputs, facts = load_file(plan.with_suffix(".safetensors")), json.loads(plan.with_suffix(".out.json").read_text())
    for name, each in found.items():
        each.output, each.facts = outputs[name], facts[name]
    return found


@pytest.mark.parametrize("name", [*NEW, *SCORES, "trained actor", "trained reward_model"])
def test_transformers_computes_what_we_do(made, tokens_BS, name):
    found, output = made[name], output_of(made[name].role, tokens_BS)
    if name == "judge":
        output = output[:, -1]  # all that its class gives
    assert found.output.std() > 0.3
    torch.testing.assert_close(output, found.output, rtol=0, atol=1e-4)
    assert found.facts["missing"] == [] and found.facts["dtype"] == "torch.float32"


@pytest.mark.parametrize("name", NEW)
def test_a_new_language_model_has_its_class_and_its_special_tokens(made, tokenizer, tmp_path, name):
    facts = made[name].facts
    assert (facts["class"], facts["unexpected"]) == (NEW[name][0], [])
    assert (facts["ids"], facts["generation_eos"]) == ([0, 1, 2], 2)
    Import.of(made[name].out).write(tmp_path / "again")
    assert export_of(tmp_path / "again").plan == export_of(made[name].checkpoint, tokenizer=tokenizer).plan


@pytest.mark.parametrize("name", SCORES)
def test_a_new_scalar_model_says_what_it_is(made, name):
    _, _, kind, score_type = SCORES[name]
    config = json.loads((made[name].out / "config.json").read_text())
    assert config["architectures"] == [kind] and config.get("score_type") == score_type
    assert not (made[name].out / "generation_config.json").exists()
    model, again = made[name].role.model, HuggingFaceModel.open(made[name].out).description.model
    assert again.score_mean == model.score_mean and again.score_std == pytest.approx(model.score_std)


def test_a_new_model_in_bf16(runtime, tmp_path, tokenizer):
    role = Role("actor", MODEL, runtime, VOCABULARY, "bf16", 1)
    path = checkpoint.save(tmp_path / "run", 3, [role], {}, 0, runtime, keep_last=0)
    export_of(path, tokenizer=tokenizer).write(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {value.dtype for value in weights_of(tmp_path / "out").values()} == {torch.bfloat16}


def test_the_tokenizer_loads_in_transformers(runtime, tmp_path, tokenizer):
    role = Role("actor", MODEL, runtime, VOCABULARY, "fp32", 1)
    path = checkpoint.save(tmp_path / "run", 3, [role], {}, 0, runtime, keep_last=0)
    with pytest.raises(UserError, match="actor came with no tokenizer"):
        export_of(path)
    export_of(path, tokenizer=tokenizer / "tokenizer.json").write(tmp_path / "out")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<s>", "</s>", "<pad>")
    assert loaded("w5 w7")["input_ids"] == [8, 10]


def test_a_sentencepiece_tokenizer_loads_in_transformers(runtime, tmp_path):
    text, draw = tmp_path / "text", random.Random(0)
    text.write_text("\n".join(" ".join(draw.choices("abcdefgh", k=9)) for _ in range(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "spm"), vocab_size=40, model_type="bpe", hard_vocab_limit=False,
        minloglevel=2, byte_fallback=False,
    )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    role = Role("actor", MODEL, runtime, model.get_piece_size(), "fp32", 1)
    path = checkpoint.save(tmp_path / "run", 3, [role], {}, 0, runtime, keep_last=0)
    export_of(path, tokenizer=tmp_path / "spm.model").write(tmp_path / "out")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded("c a b", add_special_tokens=False)["input_ids"] == model.encode("c a b")
    assert loaded.eos_token_id == model.eos_id() and loaded.bos_token_id == model.bos_id()


# Whole or not at all.


def test_an_architecture_that_is_not_its_configs(imported):
    state = json.loads((imported / "state.json").read_text())
    state["roles"]["actor"]["model"]["rotary_base"] = 77.0
    (imported / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="config.json: expected rotary_base 77.0, as state.json has it, found 10000.0"):
        export_of(imported)


def test_an_interrupt_leaves_nothing(imported, tmp_path):
    def progress(count):
        raise KeyboardInterrupt

    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        export_of(imported).write(tmp_path / "out", progress)
    assert sorted(tmp_path.iterdir()) == before
