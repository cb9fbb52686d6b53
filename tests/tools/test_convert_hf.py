"""tools/convert_hf.py, as a person uses it: what it says, its exit codes, and what it leaves behind."""

import fcntl
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models

from megatron_safe.config import ModelConfig, ParallelConfig
from megatron_safe.models.roles import Role
from megatron_safe.runtime import start
from megatron_safe.training import checkpoint

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_hf.py"
CONFIG = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=32, intermediate_size=44, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, vocab_size=131, max_position_embeddings=64, rms_norm_eps=1e-5,
    torch_dtype="float32",
)  # fmt: skip
MODEL = ModelConfig(
    num_layers=2, hidden_size=32, ffn_hidden_size=44, num_attention_heads=4, max_sequence_length=64, vocab_multiple=16
)
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def tool():
    """The tool's main, called in this process."""
    sys.path.insert(0, str(TOOL.parent))
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGHUP)}
    try:
        import convert_hf

        yield convert_hf.main
    finally:
        sys.path.remove(str(TOOL.parent))
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


@pytest.fixture
def run(tool, capsys):
    """arguments -> (exit code, standard output, standard error)"""

    def call(*arguments) -> tuple[int, str, str]:
        code = tool([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


def write_model(folder: Path, **changes) -> Path:
    """Two shards of a small Llama, or with changes to its config.json."""
    config = CONFIG | changes
    h, f, V = (config[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
    shapes = {"model.embed_tokens.weight": (V, h), "model.norm.weight": (h,), "lm_head.weight": (V, h)}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        shapes |= {f"{name}self_attn.{each}_proj.weight": (h, h) for each in "qo"}
        shapes |= {f"{name}self_attn.{each}_proj.weight": (h // 2, h) for each in "kv"}
        shapes |= {f"{name}mlp.{each}_proj.weight": (f, h) for each in ("gate", "up")}
        shapes[f"{name}mlp.down_proj.weight"] = (h, f)
        shapes |= {f"{name}{each}_layernorm.weight": (h,) for each in ("input", "post_attention")}
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    names = list(tensors)
    places = {}
    for file, part in ((FIRST, names[: len(names) // 2]), (SECOND, names[len(names) // 2 :])):
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(value.nbytes for value in tensors.values())}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}\n')
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("original") / "hf")


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """A copy to be spoilt."""
    return shutil.copytree(original, tmp_path / "hf")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run folder with an actor and a reward model that never came from Hugging Face, and its config.yaml."""
    run = tmp_path_factory.mktemp("trained") / "run"
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(128))]
    tokenizer = Tokenizer(tokenizer_models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    tokenizer.add_special_tokens(words[:3])
    run.mkdir()
    tokenizer.save(str(run / "tokenizer.json"))
    with start(ParallelConfig(), 0) as runtime:
        roles = [Role(name, MODEL, runtime, 131, "fp32", 0) for name in ("actor", "reward_model")]
        checkpoint.save(run, 7, roles, {}, 0, runtime, keep_last=0)
        checkpoint.save(run, 9, roles[1:], {}, 0, runtime, keep_last=0)
    (run / "config.yaml").write_text(f"stage: ppo-lag\ntokenizer:\n  path: {run}/tokenizer.json\n  template: plain\n")
    return run


def test_there_and_back(run, original, tmp_path):
    code, out, err = run("import", "--hf", original, "--out", tmp_path / "run")
    assert code == 0 and "LlamaForCausalLM" in out and "role actor" in out
    assert "import: 0.00 of 0.00 GB" in err  # a line, where there is no terminal
    code, out, err = run("export", "--checkpoint", tmp_path / "run", "--out", tmp_path / "back")
    assert code == 0 and "2 file(s)" in out and "export: " in err
    names = sorted(path.name for path in original.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "back").iterdir())
    assert all((original / name).read_bytes() == (tmp_path / "back" / name).read_bytes() for name in names)


def test_other_types_and_shards(run, original, tmp_path):
    assert run("import", "--hf", original, "--out", tmp_path / "run", "--role", "lm", "--dtype", "bf16")[0] == 0
    options = ("--dtype", "fp16", "--max-shard-size", "20KB")
    assert run("export", "--checkpoint", tmp_path / "run", "--out", tmp_path / "back", *options)[0] == 0
    files = list((tmp_path / "back").glob("model-*.safetensors"))
    tensors = {name: value for file in files for name, value in load_file(file).items()}
    expected = {name: value for file in (FIRST, SECOND) for name, value in load_file(original / file).items()}
    assert len(files) == 3 and all(torch.equal(tensors[name], expected[name].bfloat16().half()) for name in expected)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "float16"


@pytest.mark.parametrize("role", ["actor", "reward_model"])
def test_a_run_that_never_came_from_hugging_face(run, trained, tmp_path, role):
    checkpoints = trained / "checkpoints"
    code, _, err = run("export", "--checkpoint", checkpoints / "step_00000007", "--role", role, "--out", tmp_path / "x")
    assert code == 0, err
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    assert config["architectures"] == [{"actor": "LlamaForCausalLM", "reward_model": "LlamaForScore"}[role]]
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 0)
    assert (tmp_path / "x" / "tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()


def test_the_newest_good_checkpoint_and_its_only_role(run, trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    code, out, _ = run("export", "--checkpoint", folder, "--out", tmp_path / "x", "--dry-run")
    assert code == 0 and "step_00000009, role reward_model: LlamaForScore" in out and "nothing written" in out
    (folder / "checkpoints" / "step_00000009" / "state.json").write_text("{}")
    code, out, _ = run("export", "--checkpoint", folder, "--out", tmp_path / "x", "--dry-run")
    assert code == 0 and "warning: checkpoint is damaged" in out and "step_00000007, role actor" in out
    assert not (tmp_path / "x").exists()


def test_a_dry_run_writes_nothing(run, original, tmp_path):
    code, out, err = run("import", "--hf", original, "--out", tmp_path / "run", "--dry-run")
    assert code == 0 and "nothing written" in out and err == "" and not any(tmp_path.iterdir())


def table(text: str) -> dict[str, str]:
    return {line[:18].strip(): line[18:] for line in text.splitlines() if line}


def test_inspect_a_folder(run, original):
    code, out, _ = run("inspect", original)
    assert code == 0
    assert table(out) == {
        "folder": str(original), "files of weights": "2", "architecture": "LlamaForCausalLM", "parameters": "23,136",
        "types": "float32", "vocabulary": "131 (stored as 256)", "head": "language",
        "layers": "2 of width 32, SwiGLU 44", "heads": "4, key/value heads 2, of 8",
        "positions": "64, RoPE default, base 10000", "tensor parallel": "1, 2", "pipeline parallel": "1, 2",
    }  # fmt: skip
    parameters = sum(value.numel() for file in (FIRST, SECOND) for value in load_file(original / file).values())
    assert table(out)["parameters"] == f"{parameters:,}"


def test_inspect_a_checkpoint(run, original, trained, tmp_path):
    run("import", "--hf", original, "--out", tmp_path / "run")
    before, after = (table(run("inspect", path)[1]) for path in (original, tmp_path / "run"))
    for row in ("folder", "files of weights"):
        del before[row]
    assert after.items() >= before.items() and (after["step"], after["roles"]) == ("0", "actor")

    code, out, _ = run("inspect", trained / "checkpoints" / "step_00000007")
    assert code == 0
    tables = out.split("\n\n")
    assert table(tables[0])["roles"] == "actor, reward_model" and table(tables[0])["step"] == "7"
    assert [table(text)["head"] for text in tables[1:3]] == ["language", "score with bias"]


# Bad input: one line, exit code 2, nothing left behind.


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def edit_shard(folder: Path, change) -> None:
    tensors = load_file(folder / SECOND)
    change(tensors)
    save_file(tensors, folder / SECOND, metadata={"format": "pt"})


def edit_index(folder: Path, change) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    change(index["weight_map"])
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def missing_shard(folder):
    (folder / SECOND).unlink()
    return SECOND


def index_of_an_absent_tensor(folder):
    edit_index(folder, lambda places: places.update({"model.layers.9.absent": SECOND}))
    return "model.layers.9.absent"


def unknown_tensor(folder):
    edit_shard(folder, lambda tensors: tensors.update({"model.surprise": torch.ones(2)}))
    edit_index(folder, lambda places: places.update({"model.surprise": SECOND}))
    return "model.surprise"


def missing_tensor(folder):
    edit_shard(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    edit_index(folder, lambda places: places.pop("model.layers.1.mlp.up_proj.weight"))
    return "model.layers.1.mlp.up_proj.weight"


def wrong_shape(folder):
    edit_shard(folder, lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.weight": torch.ones(45, 32)}))
    return "model.layers.1.mlp.up_proj.weight"


def truncated(folder):
    os.truncate(folder / SECOND, (folder / SECOND).stat().st_size - 9)
    return SECOND


def truncated_in_its_header(folder):
    os.truncate(folder / SECOND, 100)
    return SECOND


def other_architecture(folder):
    edit_config(folder, architectures=["Gemma2ForCausalLM"], model_type="gemma2")
    return "gemma2"


def other_rope(folder):
    edit_config(folder, rope_scaling={"rope_type": "yarn", "factor": 4.0})
    return "yarn"


def no_config(folder):
    (folder / "config.json").unlink()
    return "config.json"


def no_folder(folder):
    shutil.rmtree(folder)
    return str(folder)


DAMAGES = [
    missing_shard, index_of_an_absent_tensor, unknown_tensor, missing_tensor, wrong_shape, truncated,
    truncated_in_its_header, other_architecture, other_rope, no_config, no_folder,
]  # fmt: skip


@pytest.mark.parametrize("command", ["import", "inspect"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_folders_that_are_refused(run, folder, tmp_path, damage, command):
    named = damage(folder)
    before = sorted(tmp_path.rglob("*"))
    arguments = (folder,) if command == "inspect" else ("--hf", folder, "--out", tmp_path / "run")
    code, out, err = run(command, *arguments)
    assert (code, out) == (2, "") and err.startswith("convert_hf: error: ") and err.count("\n") == 1
    assert named in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "arguments, what",
    [
        (("import", "--hf", "HF", "--out", "HF"), "nothing is overwritten"),
        (("import", "--hf", "HF", "--out", "NEW", "--role", "score"), "expected a scalar head"),
        (("import", "--hf", "RUN", "--out", "NEW"), "config.json"),
        (("export", "--checkpoint", "HF", "--out", "NEW"), "found a Hugging Face folder"),
        (("export", "--checkpoint", "NEW", "--out", "NEW"), "expected a checkpoint or a run folder"),
        (("export", "--checkpoint", "RUN", "--out", "HF"), "nothing is overwritten"),
        (("export", "--checkpoint", "RUN", "--out", "NEW", "--role", "actor"), "one of its roles, reward_model"),
        (("export", "--checkpoint", "RUN", "--out", "NEW", "--max-shard-size", "big"), "max-shard-size"),
        (("export", "--checkpoint", "RUN", "--out", "NEW", "--tokenizer", "NEW"), "expected a tokenizer"),
        (("inspect", "NEW"), "a run folder or a checkpoint, found none"),
    ],
)
def test_requests_that_are_refused(run, original, trained, tmp_path, arguments, what):
    places = {"HF": original, "RUN": trained, "NEW": tmp_path / "new"}
    code, out, err = run(*(places.get(argument, argument) for argument in arguments))
    assert (code, out) == (2, "") and err.startswith("convert_hf: error: ") and err.count("\n") == 1
    assert what in err and not any(tmp_path.iterdir())


def test_several_roles_need_a_choice(run, tmp_path):
    with start(ParallelConfig(), 0) as runtime:
        roles = [Role(name, MODEL, runtime, 131, "fp32", 0) for name in ("reward_critic", "cost_critic")]
        checkpoint.save(tmp_path / "run", 7, roles, {}, 0, runtime, keep_last=0)
    code, _, err = run("export", "--checkpoint", tmp_path / "run", "--out", tmp_path / "x")
    assert code == 2 and "expected --role to say which of its roles to export: reward_critic, cost_critic" in err


def test_a_run_whose_tokenizer_is_gone(run, trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    (folder / "config.yaml").write_text("stage: sft\ntokenizer: {path: /nowhere/at/all, template: plain}\n")
    code, _, err = run("export", "--checkpoint", folder, "--out", tmp_path / "x")
    assert code == 2 and "/nowhere/at/all is not there (any more); name one with --tokenizer" in err
    options = ("--tokenizer", trained / "tokenizer.json")
    assert run("export", "--checkpoint", folder, "--out", tmp_path / "x", *options)[0] == 0


# As a process.


def started(*arguments, program=(str(TOOL),), **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, **options,
    )  # fmt: skip


def test_a_full_disk(tmp_path_factory, tmp_path):
    """The limit on a file's size stands in for it: the write fails in the middle of a tensor."""
    sizes = dict(hidden_size=512, intermediate_size=1024, vocab_size=6400)
    large = write_model(tmp_path_factory.mktemp("large") / "hf", **sizes)  # 44 MB, 13 of them the embedding's
    limit = 20_000_000

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = started("import", "--hf", large, "--out", tmp_path / "run", preexec_fn=limited)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and out == ""
    assert err.startswith(f"convert_hf: error: {tmp_path / 'run'}: not written: File too large")
    assert err.count("\n") == 1
    assert not any(tmp_path.iterdir())


# The tool, which says that it has written a tensor and then waits: a signal finds it half-way, however fast it is.
HELD = """
import sys, time, convert_hf

def wait(self, count):
    print("begun", flush=True)
    while True: time.sleep(0.01)

convert_hf.Progress.__call__ = wait
sys.exit(convert_hf.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupts(original, tmp_path, signum, code):
    process = started("import", "--hf", original, "--out", tmp_path / "run", program=("-c", HELD), cwd=TOOL.parent)
    assert process.stdout.readline() == "begun\n"
    assert (tmp_path / ".run.converting").exists()
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err
    assert not any(tmp_path.iterdir())


def test_a_bar_on_a_terminal(original, tmp_path):
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    process = subprocess.Popen(
        [sys.executable, str(TOOL), "import", "--hf", str(original), "--out", str(tmp_path / "run")],
        stderr=theirs, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(theirs)
    text = b""
    while True:
        try:
            text += os.read(ours, 1 << 16)
        except OSError:  # the other end is closed
            break
    assert process.wait(timeout=60) == 0
    assert b"import: 100%|" in text
    os.close(ours)
