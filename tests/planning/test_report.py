"""The command: what it prints, what it refuses, and that it starts nothing."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml

from megatron_safe.cli import main
from megatron_safe.planning.machine import load_machine

ROOT = Path(__file__).parents[2]
H100 = ROOT / "docs/benchmarks/machines/h100.json"
MODEL = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4}


@pytest.fixture
def plan(tmp_path, capsys):
    """plan(*more arguments, **settings): exit code, printed, and the errors."""

    def run(*more, stage="ppo-lag", world=2, vocab=100, machine=H100, **settings):
        model = {"model": MODEL} if stage in ("sft", "reward", "cost") else dict.fromkeys(
            ("actor", "reward_model", "cost_model"), MODEL
        )  # fmt: skip
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(model | settings))
        code = main([
            "plan", stage, "--config", str(tmp_path / "run.yaml"), "--machine", str(machine),
            "--world_size", str(world), *(["--vocab_size", str(vocab)] if vocab else []), *more,
        ])  # fmt: skip
        printed = capsys.readouterr()
        return code, printed.out, printed.err.splitlines()

    return run


@pytest.fixture
def small(tmp_path):
    """small(**fields): a machine like the H100 but for these."""

    def write(**fields):
        (tmp_path / "machine.json").write_text(json.dumps(json.loads(H100.read_text()) | fields))
        return tmp_path / "machine.json"

    return write


def test_it_prints_roles_phases_and_seconds_and_starts_nothing(plan, tmp_path):
    code, out, err = plan("--parallel.pipeline_model_parallel_size=2", "--picture", str(tmp_path / "step.png"))
    assert (code, err) == (0, [])
    for words in (
        "ppo-lag on 2 x H100", "TP 1 x PP 2 x DP 1", "Pipeline stage 0", "Pipeline stage 1", "actor", "reference",
        "cost_critic", "weights", "and to generate", "and to score", "and to train", "It fits", "PREDICTED",
        "not measured", "answer tokens/s",
    ):  # fmt: skip
        assert words in out
    assert (tmp_path / "step.png").stat().st_size > 0
    assert not dist.is_initialized()


def test_options_change_what_they_should(plan):
    def seconds(*arguments, **settings):
        code, out, _ = plan(*arguments, **settings)
        assert code == 0
        return {name: float(re.search(rf"^{name} +([\d.]+) s", out, re.M)[1]) for name in ("generate", "score", "step")}

    plain = seconds()
    assert seconds("--mean_new_tokens", "16")["generate"] < plain["generate"]
    # Critics that take more than one step on a rollout value it beforehand.
    several = seconds("--ppo.mini_batch_size=32")
    assert several["score"] > plain["score"]
    assert seconds("--rollout.verify_logprobs=true")["score"] > plain["score"]
    assert seconds(critics="shared")["step"] < plain["step"]


def test_roles_are_those_of_the_run(plan):
    _, out, _ = plan(critics="shared")
    assert re.search("^critic ", out, re.M) and "reward_critic" not in out
    _, out, _ = plan(stage="ppo")
    assert "reward_critic" in out and "cost" not in out
    code, out, _ = plan(stage="reward")
    assert code == 0 and "reward_model" in out and "generate" not in out


@pytest.mark.parametrize("bytes_of_memory, ending", [(11.5e6, "nearest layout that fits: TP "), (1e6, "No layout")])
def test_what_does_not_fit_gets_a_layout_that_does(plan, small, bytes_of_memory, ending):
    machine = small(memory_bytes=bytes_of_memory, reserved_bytes=0.0)
    code, out, _ = plan(machine=machine, rollout={"max_new_tokens": 16, "max_prompt_length": 16},
                        ppo={"max_tokens_per_micro_batch": 256, "max_tokens_per_score_micro_batch": 256})  # fmt: skip
    assert code == 0
    assert "It does NOT fit" in out and ending in out and "PREDICTED" not in out


def test_the_layout_it_names_fits(plan, small):
    machine = small(memory_bytes=11.5e6, reserved_bytes=0.0)
    settings = dict(rollout={"max_new_tokens": 16, "max_prompt_length": 16},
                    ppo={"max_tokens_per_micro_batch": 256, "max_tokens_per_score_micro_batch": 256})  # fmt: skip
    _, out, _ = plan(machine=machine, **settings)
    tp, pp = re.search(r"that fits: TP (\d+) x PP (\d+)", out).groups()
    _, out, _ = plan(f"--parallel.tensor_model_parallel_size={tp}", f"--parallel.pipeline_model_parallel_size={pp}",
                     machine=machine, **settings)  # fmt: skip
    assert "It fits" in out


@pytest.mark.parametrize(
    "more, settings, words",
    [
        (["--world_size", "3"], {"parallel": {"tensor_model_parallel_size": 2}}, "--world_size: expected a positive"),
        ([], {"vocab": None}, "expected tokenizer.path or --vocab_size, found neither"),
        ([], {"stage": "generate"}, "plan: expected one of ppo-lag"),
        (["--mean_new_tokens", "1000"], {}, "--mean_new_tokens: expected a number from 1 to 128, found 1000"),
        ([], {"world": 16, "parallel": {"tensor_model_parallel_size": 8}}, "actor.num_attention_heads"),
        ([], {"world": 3}, "do not divide into DP 3"),
        (["--actor.checkpoint=nowhere"], {}, "actor.checkpoint nowhere: expected a checkpoint or a run folder"),
        (["--world_size", "two"], {}, "plan: argument --world_size"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(plan, more, settings, words):
    code, _, err = plan(*more, **settings)
    assert code == 2 and len(err) == 1 and words in err[0]


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"basis": "guessed"}, "basis: expected measured or data sheet, found 'guessed'"),
        ({"optimizer": 0}, "optimizer: expected a number above 0, found 0"),
        ({"flops": {"fp32": [[64, 1e9], [8, 1e9]]}}, "flops.fp32: expected [rows, FLOP/s] pairs"),
        ({"flops": {"bf16": [[64, 1e9]]}}, "flops: expected fp32 in it"),
        ({"inside": {"latency": 0.0}}, "inside.bandwidth: missing"),
        ({"color": "red"}, "color: no such field"),
    ],
)
def test_a_wrong_machine_file_is_named(plan, small, fields, words):
    code, _, err = plan(machine=small(**fields))
    assert code == 2 and len(err) == 1 and words in err[0] and "machine.json" in err[0]


def test_machine_files_that_are_kept_are_whole():
    for path in H100.parent.glob("*.json"):
        machine = load_machine(str(path))
        assert dataclasses.asdict(machine)["name"] == machine.name
    assert load_machine(str(H100)).basis == "data sheet"


def test_the_examples_fit_and_are_called_predictions():
    text = (ROOT / "docs/planning/README.md").read_text()
    assert text.count("It fits") == text.count("PREDICTED") == len(list((ROOT / "docs/planning").glob("*.yaml"))) == 3
