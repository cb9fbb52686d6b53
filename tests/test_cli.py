"""The command line: what it shows, what it writes, and what it refuses, with which words."""

import ast
import dataclasses
import inspect
import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from tokenizers import Tokenizer

from megatron_safe.cli import main, parse
from megatron_safe.config import STAGES, SftConfig
from megatron_safe.errors import UserError
from megatron_safe.ranges import RANGES

STAGE_FILES = ("sft", "reward", "cost")


@pytest.fixture(scope="module")
def trained(project, tmp_path_factory):
    """A folder with one step of sft, reward and cost, each started as `main` starts it."""
    folder = tmp_path_factory.mktemp("trained")
    for stage in STAGE_FILES:
        assert main([stage, *project.arguments(stage, folder / stage, "one", "--training.steps=1", models=folder)]) == 0
    return folder


@pytest.fixture
def say(project, trained, tmp_path, capfd):
    """say(stage, *overrides): exit code and stderr lines of a command that is good without the overrides."""

    def run(stage, *overrides, out="out"):
        base = {"ppo": "ppo-lag", "ppo-reward-shaping": "ppo-lag"}.get(stage, stage)
        arguments = project.arguments(base, tmp_path / out, "one", *overrides, models=trained)
        if stage == "generate":
            arguments = [f"--model.checkpoint={trained}/sft" if "/ppo-lag" in a else a for a in arguments]
        capfd.readouterr()
        code = main([stage, *arguments])
        return code, capfd.readouterr().err.splitlines()

    return run


# What it shows.


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "megatron_safe.cli", *arguments], capture_output=True, text=True, timeout=100,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"} | environment,
    )  # fmt: skip


def test_without_a_stage_it_says_which_there_are(capsys):
    for arguments, code in (([], 2), (["--help"], 0), (["-h"], 0)):
        assert main(arguments) == code
        assert set(STAGES) <= set(capsys.readouterr().out.replace(",", " ").split())


@pytest.mark.parametrize("stage", STAGES)
def test_help_lists_every_setting_with_its_doc(stage, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as left:
        main([stage, "--help"])
    assert left.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert " ".join(STAGES[stage].__doc__.split()) in shown
    for name, doc in documented_fields(STAGES[stage]):
        assert f"--{name} " in shown, name
        assert " ".join(doc.split()) in shown, (name, doc)


def documented_fields(config, prefix=""):
    """(dotted name, docstring) of every field, read from the source, in which a field's docstring follows it."""
    (definition,) = ast.parse(inspect.getsource(config)).body
    docs = {}
    for statement, following in zip(definition.body, [*definition.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            docs[statement.target.id] = following.value.value
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(field.type):
            yield from documented_fields(field.type, f"{prefix}{field.name}.")
        else:  # an optional section is one setting here; its fields are those of the section that it replaces
            assert field.name in docs, f"{config.__name__}.{field.name} has no docstring"
            yield prefix + field.name, docs[field.name]


# What it reads and writes.


def test_a_file_and_overrides_in_the_order_given(tmp_path):
    (tmp_path / "run.yaml").write_text("model: {num_layers: 3, hidden_size: 64}\noptimizer: {lr: 1.0e-4}\n")
    config = parse("sft", [f"--config={tmp_path / 'run.yaml'}", "--model.hidden_size=96", "--data.train=[a.jsonl]"])
    assert isinstance(config, SftConfig)
    assert (config.model.num_layers, config.model.hidden_size, config.optimizer.lr) == (3, 96, 1e-4)
    assert config.data.train == ["a.jsonl"]
    assert config.model.ffn_hidden_size == SftConfig().model.ffn_hidden_size


@pytest.mark.parametrize("stage", STAGES)
def test_the_defaults_are_within_their_ranges(stage):
    assert dataclasses.asdict(parse(stage, [])) == dataclasses.asdict(STAGES[stage]())


def test_every_range_is_of_a_setting_that_exists():
    for section, ranges in RANGES.items():
        assert set(ranges) <= {field.name for field in dataclasses.fields(section)}


def test_the_resolved_config_is_written_and_can_be_read_again(project, trained):
    written = yaml.safe_load((trained / "sft" / "config.yaml").read_text())
    assert written["stage"] == "sft"
    arguments = project.arguments("sft", trained / "sft", "one", "--training.steps=1", models=trained)
    assert {"stage": "sft", **dataclasses.asdict(parse("sft", arguments))} == written
    assert written["optimizer"]["beta1"] == 0.9  # a default, resolved
    again = parse("sft", [f"--config={trained / 'sft' / 'config.yaml'}"])
    assert {"stage": "sft", **dataclasses.asdict(again)} == written
    with pytest.raises(UserError, match="stage"):
        parse("reward", [f"--config={trained / 'sft' / 'config.yaml'}"])


@pytest.mark.parametrize("stage", ["ppo-lag", "ppo", "ppo-reward-shaping", "generate"])
def test_the_commands_that_the_bad_ones_start_from_are_good(say, tmp_path, stage):
    code, _ = say(stage, *(["--ppo.steps=1"] if "ppo" in stage else []))
    assert code == 0
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["stage"] == stage


# What it refuses.

# name: (stage, overrides, what the line says); {files} are made by `files` below
BAD = {
    # the config
    "unknown key": ("sft", ["--model.layers=2"], "unrecognized arguments: --model.layers=2"),
    "unknown key in the file": ("sft", ["--config={unknown_key}"], "'model' does not accept option 'layers'"),
    "unknown section": ("sft", ["--config={unknown_section}"], "Option 'modle.num_layers' is not accepted"),
    "no such file": ("sft", ["--config={tmp}/none.yaml"], "File does not exist: '{tmp}/none.yaml'"),
    "a folder for a file": ("sft", ["--config={tmp}"], "Path is not a file: '{tmp}'"),
    "invalid YAML": ("sft", ["--config={invalid}"], "Problems parsing config: while parsing a flow sequence"),
    "a list for a config": ("sft", ["--config={listed}"], "Unexpected config: - 1"),
    "a number for a section": ("sft", ["--config={number}"], "model: expected a mapping of settings, found 3"),
    "another stage's config": ("sft", ["--config={cost_config}"], "stage"),
    "a word for a number": ("sft", ["--model.num_layers=two"], '"model.num_layers": Expected a <class \'int\'>'),
    "a fraction for a count": ("sft", ["--training.steps=1.5"], '"training.steps": Expected a <class \'int\'>'),
    "unknown choice": ("sft", ["--batch.precision=fp8"], '"batch.precision": Expected a typing.Literal'),
    # ranges
    "negative seed": ("sft", ["--run.seed=-1"], "run.seed: expected a whole number from 0 to 2^63 - 1, found -1"),
    "no steps": ("sft", ["--training.steps=0"], "training.steps: expected 1 or more, found 0"),
    "negative steps": ("ppo-lag", ["--ppo.steps=-3"], "ppo.steps: expected 1 or more, found -3"),
    "negative learning rate": ("sft", ["--optimizer.lr=-0.1"], "optimizer.lr: expected 0 or more, found -0.1"),
    "learning rate NaN": ("sft", ["--optimizer.lr=.nan"], "optimizer.lr: expected 0 or more, found nan"),
    "parameters gathered late, all on each rank": (
        "sft", ["--optimizer.overlap_param_gather=true", "--optimizer.overlap_grad_reduce=true"],
        "optimizer.overlap_param_gather: expected distributed to be true too, found false",
    ),
    "parameters gathered late alone": (
        "sft", ["--optimizer.overlap_param_gather=true", "--optimizer.distributed=true"],
        "optimizer.overlap_param_gather: expected overlap_grad_reduce to be true too, found false",
    ),
    "min_lr above lr": ("sft", ["--optimizer.min_lr=1"], "optimizer.min_lr: expected at most lr 0.01, found 1"),
    "beta": ("sft", ["--optimizer.beta2=1"], "optimizer.beta2: expected a number from 0 to below 1, found 1"),
    "kl_coeff": ("ppo-lag", ["--ppo.kl_coeff=-0.1"], "ppo.kl_coeff: expected 0 or more, found -0.1"),
    "clip_ratio": ("ppo-lag", ["--ppo.clip_ratio=0"], "ppo.clip_ratio: expected a number above 0, found 0"),
    "gamma": ("ppo-lag", ["--ppo.gamma=1.01"], "ppo.gamma: expected a number from 0 to 1, found 1.01"),
    "epochs": ("ppo-lag", ["--ppo.epochs=0"], "ppo.epochs: expected 1 or more, found 0"),
    "new tokens": ("ppo-lag", ["--rollout.max_new_tokens=0"], "rollout.max_new_tokens: expected 1 or more, found 0"),
    "top_p": ("ppo-lag", ["--rollout.top_p=1.5"], "rollout.top_p: expected a number above 0 and up to 1, found 1.5"),
    "top_k": ("generate", ["--rollout.top_k=-1"], "rollout.top_k: expected 0 (all) or more, found -1"),
    "greedy PPO": ("ppo", ["--rollout.temperature=0"], "rollout.temperature: PPO needs a temperature > 0, found 0"),
    "red-team share": ("ppo-lag", ["--ppo.red_team_share=2"], "ppo.red_team_share: expected a number from 0 to 1"),
    "lambda_init": ("ppo-lag", ["--lagrange.lambda_init=9"], "lagrange.lambda_max must be >= lambda_init = 9.0"),
    "lambda_min": ("ppo", ["--lagrange.lambda_min=0"], "lagrange.lambda_min must be > 0"),
    "cost window": (
        "ppo-lag", ["--lagrange.episode_cost_window=0"], "lagrange.episode_cost_window: expected 1 or more",
    ),
    "shaping": ("ppo-reward-shaping", ["--ppo.shaping_coeff=-1"], "ppo.shaping_coeff: expected 0 or more, found -1"),
    # layout and batch sizes
    "tensor size": ("sft", ["--parallel.tensor_model_parallel_size=2"], "= 2 does not divide the world of 1 process"),
    "pipeline size 0": (
        "sft", ["--parallel.pipeline_model_parallel_size=0"],
        "parallel.pipeline_model_parallel_size: expected 1 or more, found 0",
    ),
    "token budget": (
        "sft", ["--batch.max_tokens_per_micro_batch=0"],
        "batch.max_tokens_per_micro_batch: expected 1 or more, found 0",
    ),
    "token budgets of PPO": (
        "ppo-lag", ["--ppo.max_tokens_per_score_micro_batch=-1"],
        "ppo.max_tokens_per_score_micro_batch: expected 1 or more, found -1",
    ),
    "batch of none": (
        "reward", ["--batch.global_batch_size=0"],
        "batch.global_batch_size: expected a positive multiple of the data-parallel size 1, found 0",
    ),
    "mini-batch": (
        "ppo-lag", ["--ppo.mini_batch_size=-8"],
        "ppo.mini_batch_size: expected a positive multiple of the data-parallel size 1, found -8",
    ),
    "rollout batch": (
        "ppo-lag", ["--ppo.rollout_batch_size=12"],
        "ppo.rollout_batch_size: expected a positive multiple of mini_batch_size 8, found 12",
    ),
    "heads": (
        "sft", ["--model.num_attention_heads=5"], "model.hidden_size: expected a multiple of num_attention_heads 5",
    ),
    "no groups": ("sft", ["--model.num_query_groups=0"], "model.num_query_groups: expected 1 or more, found 0"),
    "groups": ("sft", ["--model.num_query_groups=3"], "model.num_query_groups: expected a divisor of"),
    "short model": (
        "sft", ["--model.max_sequence_length=16"], "model.max_sequence_length: expected at least the 24 tokens",
    ),
    "long answers": (
        "ppo-lag", ["--rollout.max_new_tokens=99"],
        "actor.max_sequence_length: expected at least the 111 tokens of the longest row, found 40",
    ),
    # data
    "no data": ("sft", ["--data.train=[]"], "data.train: expected at least one path or {{source"),
    "missing data": (
        "sft", ["--data.train=[{tmp}/none.jsonl]"], "none.jsonl: expected a .jsonl, .json (either also",
    ),
    "a folder of data": ("reward", ["--data.train=[{tmp}]"], "expected train.jsonl, train.json (.gz, .xz) or"),
    "a text file": ("sft", ["--data.train=[{text}]"], "text.txt: expected a .jsonl, .json (either"),
    "an empty file": ("sft", ["--data.train=[{empty}]"], "empty.jsonl: expected at least one row, found an empty file"),
    "not JSON": (
        "sft", ["--data.train=[{broken}]"], "broken.jsonl, line 2: expected a JSON object, found invalid JSON",
    ),
    "not UTF-8": ("sft", ["--data.train=[{latin}]"], "latin.jsonl, line 1: expected UTF-8 text, found byte 0xe9"),
    "prompts without answers": ("sft", ["--data.train=[{prompts}]"], "line 1, field 'response': expected a string"),
    "a number for a text": (
        "sft", ["--data.train=[{typed}]"], "line 1, field 'response': expected a string, found the",
    ),
    "an id out of range": (
        "cost", ["--data.train=[{id}]"], "line 1, field 'safer_response_id': expected 0, 1 or \"tie\", found",
    ),
    "bad held-out rows": ("reward", ["--data.eval=[{prompts}]"], "line 1, field 'response_0': expected a string"),
    "a word for a mark": ("ppo-lag", ["--data.prompts=[{mark}]"], "line 1, field 'red_team': expected true or false"),
    "no prompt fits": ("ppo-lag", ["--rollout.max_prompt_length=3"], "prompts: expected at least one row with room"),
    "no red-team prompt": ("ppo-lag", ["--data.prompts=[{benign}]"], "data.prompts: expected some with red_team true"),
    "PTX without data": ("ppo-lag", ["--data.ptx=[]"], "data.ptx: expected demonstrations, because ppo.ptx_coeff > 0"),
    # tokenizer and template
    "no tokenizer": (
        "sft", ["--tokenizer.path={tmp}/none"], "none: expected a tokenizer folder or file, found nothing",
    ),
    "an empty folder": (
        "sft", ["--tokenizer.path={tmp}/hollow"], "hollow: expected tokenizer.json or one SentencePiece",
    ),
    "a broken tokenizer": (
        "sft", ["--tokenizer.path={broken_tokenizer}"], "expected a Hugging Face tokenizer, found an",
    ),
    "a template without a prompt": ("sft", ["--tokenizer.template=ask"], "template 'ask': expected {{prompt}} once"),
    "another tokenizer": (
        "reward", ["--tokenizer.path={larger}"],
        "expected the tokenizer's vocabulary of 44 tokens, found a model of 43",
    ),
    # checkpoints and run folders
    "no checkpoint": ("ppo-lag", ["--actor.checkpoint={tmp}/none"], "none: expected a checkpoint or a run folder with"),
    "no reward model": (
        "ppo", ["--reward_model.checkpoint=null"], "reward_model.checkpoint: expected the run folder of",
    ),
    "no cost model": ("ppo-lag", ["--cost_model.checkpoint=null"], "cost_model.checkpoint: expected the run folder of"),
    "a reward model for an actor": (
        "ppo-lag", ["--actor.checkpoint={reward}"], "expected actor to start actor from, found reward_model",
    ),
    "models swapped": (
        "ppo-lag", ["--cost_model.checkpoint={reward}"],
        "expected cost_model or score or actor to start cost_model from, found",
    ),
    "a policy for a reward model": (
        "ppo-lag", ["--reward_model.checkpoint={sft}"], "expected a trained reward_model, found actor",
    ),
    "a folder that holds a run": ("sft", ["--run.out={sft}"], "sft: holds a run already; choose another folder, or"),
    "another seed": (
        "sft", ["--run.out={sft}", "--run.resume=auto", "--run.seed=5"], "run.seed: expected 0, the seed of the run in",
    ),
    "a file in the way": ("sft", ["--run.out={text}/out"], "text.txt/out: cannot be written"),
}  # fmt: skip


@pytest.fixture
def files(project, trained, tmp_path):
    """What the bad commands name, made in the test's own folder."""

    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    (tmp_path / "hollow").mkdir()
    (tmp_path / "larger").mkdir()
    larger = Tokenizer.from_file(str(project.data / "tokenizer" / "tokenizer.json"))
    larger.add_tokens(["one_more"])
    larger.save(str(tmp_path / "larger" / "tokenizer.json"))
    pair = {"prompt": "w1", "response_0": "w2", "response_1": "w3", "better_response_id": 0, "safer_response_id": 2}
    return {
        "tmp": tmp_path,
        "sft": trained / "sft",
        "reward": trained / "reward",
        "cost_config": trained / "cost" / "config.yaml",
        "prompts": project.data / "prompts.jsonl",
        "larger": tmp_path / "larger",
        "unknown_key": write("unknown_key.yaml", "model: {layers: 2}"),
        "unknown_section": write("unknown_section.yaml", "modle: {num_layers: 2}"),
        "invalid": write("invalid.yaml", "data: {train: [a"),
        "listed": write("listed.yaml", "- 1"),
        "number": write("number.yaml", "model: 3"),
        "text": write("text.txt", "hello"),
        "empty": write("empty.jsonl", "\n"),
        "broken": write("broken.jsonl", '{"prompt": "w1", "response": "w2"}\n{"prompt": '),
        "latin": write("latin.jsonl", b'{"prompt": "caf\xe9", "response": "w2"}\n'),
        "typed": write("typed.jsonl", '{"prompt": "w1", "response": 3}\n'),
        "id": write("id.jsonl", json.dumps(pair) + "\n"),
        "mark": write("mark.jsonl", '{"prompt": "w1", "red_team": "yes"}\n'),
        "benign": write("benign.jsonl", '{"prompt": "w1"}\n'),
        "broken_tokenizer": write("broken_tokenizer/tokenizer.json", "{}").parent,
    }


def test_there_are_enough_kinds():
    assert len(BAD) >= 25


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(say, files, tmp_path, name):
    stage, overrides, message = BAD[name]
    code, lines = say(stage, *(override.format(**files) for override in overrides))
    assert code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("megatron-safe: error: ") and message.format(**files) in lines[0], lines[0]
    # Nothing is claimed: the corrected command may use the same folder.
    assert not (tmp_path / "out" / "config.yaml").exists()
    assert not list((tmp_path / "out").glob("**/step_*"))


def test_after_a_refusal_the_same_folder_can_be_used(say, tmp_path):
    assert say("ppo-lag", f"--reward_model.checkpoint={tmp_path}/none", "--ppo.steps=1")[0] == 2
    assert say("ppo-lag", "--ppo.steps=1")[0] == 0
    code, (line,) = say("ppo-lag", "--ppo.steps=1")
    assert code == 2 and "holds a run already" in line


def test_an_unknown_stage_is_named(capsys):
    assert main(["train"]) == 2
    assert "stage: expected one of sft, reward, " in (said := capsys.readouterr().err) and "'train'" in said


@pytest.mark.parametrize("name", ["unknown key", "tensor size", "no tokenizer", "models swapped"])
def test_in_a_process_of_its_own(project, trained, files, tmp_path, name):
    """As a user starts it, with whatever the imports have to say."""
    stage, overrides, message = BAD[name]
    overrides = [override.format(**files) for override in overrides]
    done = command(stage, *project.arguments(stage, tmp_path / "out", "one", *overrides, models=trained))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("megatron-safe: error: ") and message.format(**files) in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton has a GPU here")
def test_triton_without_a_gpu_is_refused(project, tmp_path):
    arguments = project.arguments("sft", tmp_path / "out", "one", "--kernels.backend=triton")
    done = command("sft", *arguments, TRITON_INTERPRET="0")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert line.startswith("megatron-safe: error: kernels.backend: ") and "cpu" in line


def test_only_the_first_rank_speaks(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert main(["sft", "--nope"]) == 2
    assert capsys.readouterr().err == ""
