"""`evaluate --require-...`: its exit code, its line, and that everything is written all the same."""

import json

import pytest
import yaml

from megatron_safe.cli import main, parse
from megatron_safe.errors import UserError


@pytest.fixture(scope="module")
def evaluate_arguments(project, tmp_path_factory):
    """(run folder, layout, *overrides) -> the arguments that evaluate two policies, which are trained here."""
    models = tmp_path_factory.mktemp("models")
    for stage in ("sft", "reward", "cost"):
        assert main([stage, *project.arguments(stage, models / stage, "one", "--training.steps=1", models=models)]) == 0

    def arguments(out, layout, *overrides):
        shared = project.arguments("generate", out, layout, models=models)
        return [
            *(argument for argument in shared if not argument.startswith("--model.")),
            f"--policies={{base: {models}/sft, tuned: {models}/sft}}", f"--reward_model.checkpoint={models}/reward",
            f"--cost_model.checkpoint={models}/cost", *overrides,
        ]  # fmt: skip

    return arguments


def certificates(folder):
    return json.loads((folder / "report" / "summary.json").read_text())["certificates"]


def test_a_limit_that_cannot_be_promised_is_exit_code_1_with_one_line(evaluate_arguments, tmp_path, capfd):
    # Seven red-team prompts: not even without one harmful answer could they promise 5%.
    requirements = ["--require-harmful-rate", "0.05", "--require-mean-cost=1e6", "--confidence", "0.9"]
    assert main(["evaluate", *evaluate_arguments(tmp_path / "out", "one", *requirements)]) == 1
    said = capfd.readouterr()
    rate, cost = certificates(tmp_path / "out")
    assert (rate["policy"], rate["limit"], rate["confidence"], rate["prompts"]) == ("tuned", 0.05, 0.9, 7)
    assert not rate["promised"] and cost["promised"] and cost["limit"] == 1e6
    (line,) = [line for line in said.err.splitlines() if line.startswith("megatron-safe:")]
    assert line == f"megatron-safe: not promised: {rate['sentence']}" and "at most 5% cannot be promised" in line
    assert cost["sentence"] in said.out and "Traceback" not in said.err
    assert (tmp_path / "out" / "report" / "index.html").exists() and (tmp_path / "out" / "answers.jsonl").exists()
    written = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["certificate"]
    assert written == {"harmful_rate": 0.05, "mean_cost": 1e6, "confidence": 0.9, "policy": None}


def test_a_promise_is_exit_code_0(evaluate_arguments, tmp_path, capfd):
    overrides = ["--certificate.mean_cost=1e6", "--certificate.policy=base"]
    assert main(["evaluate", *evaluate_arguments(tmp_path / "out", "one", *overrides)]) == 0
    (cost,) = certificates(tmp_path / "out")
    assert cost["promised"] and cost["policy"] == "base"
    assert "not promised" not in capfd.readouterr().err


def test_every_rank_exits_alike(evaluate_arguments, tmp_path, torchrun):
    arguments = evaluate_arguments(tmp_path / "out", "dp2", "--require-harmful-rate=0.05")
    torchrun(2, "exit_code.py", str(tmp_path), "evaluate", *arguments)
    assert [(tmp_path / f"code-{rank}").read_text() for rank in range(2)] == ["1", "1"]
    assert not certificates(tmp_path / "out")[0]["promised"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["--require-harmful-rate", "0"], "certificate.harmful_rate: expected a number above 0 and below 1, found 0.0"),
        (["--require-harmful-rate=1.0"], "certificate.harmful_rate: expected a number above 0 and below 1"),
        (["--confidence=1.5"], "certificate.confidence: expected a number above 0 and below 1, found 1.5"),
        (["--require-mean-cost=.nan"], "certificate.mean_cost: expected a finite number"),
        (["--require-harmful-rate=few"], "certificate.harmful_rate"),
    ],
)
def test_bad_requirements_are_refused(overrides, said):
    with pytest.raises(UserError) as refused:
        parse("evaluate", overrides)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_an_unknown_policy_is_refused_before_anything_is_written(evaluate_arguments, tmp_path, capfd):
    arguments = evaluate_arguments(tmp_path / "out", "one", "--certificate.policy=other")
    assert main(["evaluate", *arguments]) == 2
    assert "certificate.policy: expected one of base, tuned, found 'other'" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_short_names_are_those_of_evaluate_alone():
    config = parse("evaluate", ["--require-harmful-rate", "0.05", "--require-mean-cost", "-0.5", "--confidence=0.99"])
    found = config.certificate
    assert (found.harmful_rate, found.mean_cost, found.confidence) == (0.05, -0.5, 0.99)
    with pytest.raises(UserError):
        parse("generate", ["--confidence", "0.9"])
