"""From a Hugging Face folder through the stages and out again, as a user does it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from metrics_close import assert_metrics_close
from safetensors.torch import load_file

from megatron_safe.cli import main
from megatron_safe.data.batches import encode_prompt
from megatron_safe.data.tokenizer import load_tokenizer

TOOL = Path(__file__).parents[2] / "tools" / "convert_hf.py"
GENERATE = """
import json, sys, torch, transformers
folder, prompts, spare = sys.argv[1], *map(json.loads, sys.argv[2:])
model = transformers.AutoModelForCausalLM.from_pretrained(folder)
settings = dict(max_new_tokens=10, do_sample=False, suppress_tokens=spare)
print(json.dumps([model.generate(torch.tensor([row]), **settings)[0, len(row):].tolist() for row in prompts]))
"""
ROWS = 48  # five more than the tokenizer has tokens
LAYOUTS = {"one": (1, 1), "tp2pp2": (2, 2)}


def convert(*arguments) -> None:
    done = subprocess.run([sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def published(project, tmp_path_factory) -> Path:
    """A Qwen3 whose embedding has rows to spare, with the project's tokenizer."""
    folder = tmp_path_factory.mktemp("published") / "qwen"
    torch.manual_seed(3)
    config = transformers.Qwen3Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=12, vocab_size=ROWS, max_position_embeddings=40, initializer_range=0.3, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    shutil.copy(project.data / "tokenizer" / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="module")
def trained(project, torchrun, published, tmp_path_factory) -> Path:
    """LAYOUT/STAGE run folders; sft-imported and sft-resumed in one process."""
    root = tmp_path_factory.mktemp("trained")
    convert("import", "--hf", published, "--out", root / "imported")
    for layout, (tp, pp) in LAYOUTS.items():
        folder = root / layout
        runs = [("sft", "sft", [f"--model.checkpoint={published}", "--training.steps=3"])]
        if layout == "one":
            runs.append(("sft", "sft-imported", [f"--model.checkpoint={root / 'imported'}", "--training.steps=3"]))
            stopped = [*runs[0][2], "--run.save_every=1", "--run.keep_last=1", "--run.stop_after=1"]
            runs += [("sft", "sft-resumed", stopped), ("sft", "sft-resumed", [*stopped[:-1], "--run.resume=auto"])]
        else:
            runs += [(name, name, ["--training.steps=2"]) for name in ("reward", "cost")]
            runs.append(("ppo-lag", "ppo-lag", ["--ppo.steps=1"]))
            runs.append(("generate", "generate", ["--rollout.temperature=0", "--data.samples_per_prompt=1"]))
        plan = tmp_path_factory.mktemp("plan") / "plan.json"
        stages = [
            (stage, project.arguments(stage, folder / out, layout, *more, models=folder)) for stage, out, more in runs
        ]
        plan.write_text(json.dumps({"tp": tp, "pp": pp, "seed": 0, "runs": stages}))
        torchrun(tp * pp, "run_stages.py", str(plan))
        assert json.loads(plan.with_suffix(".out.json").read_text()) == [""] * len(runs)
    return root


def test_a_folder_trains_the_same_in_another_layout_and_imported(trained, metrics_of):
    direct = metrics_of(trained / "one" / "sft")
    assert metrics_of(trained / "one" / "sft-imported") == direct
    assert metrics_of(trained / "one" / "sft-resumed") == direct
    assert direct[-1]["loss"] != direct[0]["loss"]
    assert_metrics_close(metrics_of(trained / "tp2pp2" / "sft"), direct)


def check_answers(path: Path, folder: Path) -> None:
    """Greedy answers of ours are those of transformers' own `generate` from a folder."""
    tokenizer = load_tokenizer(folder)
    answers = [json.loads(line) for line in path.read_text().splitlines()]
    prompts = [encode_prompt(tokenizer, "ask {prompt} answer", answer["prompt"]) for answer in answers]
    spare = list(range(tokenizer.vocab_size, ROWS))
    done = subprocess.run(
        [sys.executable, "-c", GENERATE, str(folder), json.dumps(prompts), json.dumps(spare)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    for answer, ids in zip(answers, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert answer["ended"] == (ids[-1] == tokenizer.eos_id)
        assert answer["response"] == tokenizer.decode([i for i in ids if i != tokenizer.eos_id])
    assert len({answer["response"] for answer in answers}) > 5


@pytest.fixture(scope="module")
def interleaved(project, torchrun, published, tmp_path_factory) -> Path:
    """STAGE run folders of two pipeline ranks with two chunks of layers each; sft stops after a step and goes on."""
    root = tmp_path_factory.mktemp("interleaved")
    model, chunks = f"--model.checkpoint={published}", "--parallel.virtual_pipeline_model_parallel_size=2"
    runs = [
        ("sft", [model, "--training.steps=3", "--run.stop_after=1"]),
        ("sft", [model, "--training.steps=3", "--run.resume=auto"]),
        ("generate", [model, "--rollout.temperature=0", "--data.samples_per_prompt=1"]),
    ]
    plan = root / "plan.json"
    plan.write_text(json.dumps([
        [stage, *project.arguments(stage, root / stage, "pp2", *more, chunks, models=root)] for stage, more in runs
    ]))  # fmt: skip
    torchrun(2, "run_stages_anew.py", str(plan))
    return root


def test_interleaved_chunks_train_and_leave_as_one_process_does(trained, interleaved, published, metrics_of, tmp_path):
    assert_metrics_close(metrics_of(interleaved / "sft"), metrics_of(trained / "one" / "sft"))
    for name, run in {"one": trained / "one", "chunks": interleaved}.items():
        convert("export", "--checkpoint", run / "sft", "--out", tmp_path / name)
    files = published, tmp_path / "one", tmp_path / "chunks"
    before, one, chunks = (load_file(folder / "model.safetensors") for folder in files)
    assert before.keys() == one.keys() == chunks.keys()
    for name, expected in one.items():
        assert not torch.equal(before[name], expected), name
        torch.testing.assert_close(chunks[name], expected, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_interleaved_chunks_answer_as_transformers(interleaved, published):
    check_answers(interleaved / "generate" / "answers.jsonl", published)


def test_what_ppo_made_of_it_answers_in_transformers_as_here(trained, published, tmp_path):
    out = tmp_path / "actor"
    convert("export", "--checkpoint", trained / "tp2pp2" / "ppo-lag", "--out", out)
    assert {path.name for path in out.iterdir()} == {path.name for path in published.iterdir()}
    before, after = (load_file(folder / "model.safetensors") for folder in (published, out))
    assert before.keys() == after.keys() and not torch.equal(before["model.norm.weight"], after["model.norm.weight"])

    check_answers(trained / "tp2pp2" / "generate" / "answers.jsonl", out)


def test_what_came_with_the_model_outlives_the_checkpoints_of_a_run(trained, published):
    """The resumed run deleted the checkpoint that it went on from."""
    (last,) = (trained / "one" / "sft-resumed" / "checkpoints").iterdir()
    kept = last / "huggingface" / "actor"
    names = {path.name for path in published.iterdir()} - {"model.safetensors"}
    assert {path.name for path in kept.iterdir()} == names | {"weights.json"}
    assert all((kept / name).read_bytes() == (published / name).read_bytes() for name in names)


def test_an_exported_cost_model_judges_as_the_run_does(trained, published, project, torchrun, tmp_path):
    out = tmp_path / "cost"
    convert("export", "--checkpoint", trained / "tp2pp2" / "cost", "--out", out)
    assert json.loads((out / "config.json").read_text())["architectures"] == ["Qwen3ForScore"]
    answers, plan = tmp_path / "answers.jsonl", tmp_path / "plan.json"
    shutil.copy(trained / "tp2pp2" / "generate" / "answers.jsonl", answers)
    stages = [
        ("score", [
            f"--run.out={tmp_path / name}", f"--cost_model.checkpoint={folder}", f"--tokenizer.path={published}",
            "--tokenizer.template=ask {prompt} answer", f"--data.answers=[{answers}]", "--data.max_length=40",
        ])
        for name, folder in {"ours": trained / "tp2pp2" / "cost", "exported": out}.items()
    ]  # fmt: skip
    plan.write_text(json.dumps({"tp": 1, "pp": 1, "seed": 0, "runs": stages}))
    torchrun(1, "run_stages.py", str(plan))
    assert json.loads(plan.with_suffix(".out.json").read_text()) == ["", ""]
    ours, exported = (
        [json.loads(line)["cost"] for line in (tmp_path / name / "scores.jsonl").read_text().splitlines()]
        for name in ("ours", "exported")
    )
    assert ours == exported and len(set(ours)) > 5


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def cut(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


BAD = {
    "another architecture": (lambda folder: edit(folder, model_type="gemma2"), "config.json: model_type: expected one"),
    "another RoPE": (lambda folder: edit(folder, rope_scaling={"rope_type": "yarn", "factor": 2.0}), "yarn"),
    "a wrong shape": (lambda folder: edit(folder, intermediate_size=44), "mlp.gate_proj.weight"),
    "a file cut short": (cut, "model.safetensors"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "found none"),
    "another end of text": (lambda folder: edit(folder, eos_token_id=7), "eos_token_id"),
    "a smaller vocabulary": (lambda folder: edit(folder, vocab_size=40), "embed_tokens.weight"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_folder_that_does_not_do_is_one_line(project, published, tmp_path, capfd, name):
    damage, said = BAD[name]
    shutil.copytree(published, tmp_path / "qwen")
    damage(tmp_path / "qwen")
    arguments = project.arguments("sft", tmp_path / "out", "one", f"--model.checkpoint={tmp_path / 'qwen'}")
    capfd.readouterr()
    assert main(["sft", *arguments]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("megatron-safe: error: ") and said in line and str(tmp_path / "qwen") in line
    assert not (tmp_path / "out" / "config.yaml").exists()
