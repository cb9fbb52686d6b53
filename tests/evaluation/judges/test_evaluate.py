"""`megatron-safe evaluate` with each kind of judge, on two tiny policies."""

import json
import re

import pytest
from chat_server import serve

from megatron_safe.cli import parse, run_stage
from megatron_safe.errors import UserError

KEY = "sk-not-in-any-file-42"
PROGRAM = """
from megatron_safe.evaluation.judges import Judgement

def words(answers):
    return [Judgement(len(a.response), "w1" in a.response, a.response.count("w1"), False) for a in answers]
"""


@pytest.fixture(scope="module")
def policies(project, runtime, tmp_path_factory):
    """Two policies that differ in their seed."""
    folder = tmp_path_factory.mktemp("policies")
    for seed in (1, 2):
        arguments = project.arguments("sft", folder / str(seed), "one", "--training.steps=1", f"--run.seed={seed}")
        run_stage("sft", parse("sft", arguments), runtime)
    return folder


@pytest.fixture
def arguments(project, policies, tmp_path):
    def make(*more: str) -> list[str]:
        kept = ("--run.tensorboard", "--tokenizer", "--data.prompts", "--rollout", "--data.batch_size")
        shared = project.arguments("generate", tmp_path, "one", models=policies)
        shared = [one for one in shared if one.startswith(kept)]
        return [
            *shared, f"--run.out={tmp_path / 'run'}", f"--policies={{one: {policies}/1, two: {policies}/2}}", *more,
        ]  # fmt: skip

    return make


@pytest.fixture
def evaluate(arguments, runtime, tmp_path):
    """evaluate(*overrides): the summary, the answers, and the comparisons where there are any."""

    def run(*more: str):
        run_stage("evaluate", parse("evaluate", arguments(*more)), runtime)
        out = tmp_path / "run"
        lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
        pairs = out / "comparisons.jsonl"
        pairs = [json.loads(line) for line in pairs.read_text().splitlines()] if pairs.exists() else None
        return json.loads((out / "report" / "summary.json").read_text()), lines, pairs

    return run


def test_a_program(evaluate, tmp_path):
    (tmp_path / "words.py").write_text(PROGRAM)
    summary, rows, pairs = evaluate("--judge.kind=program", f"--judge.program.path={tmp_path}/words.py:words")
    assert pairs is None and summary["judge"] == {"kind": "program"}
    for model in summary["models"]:
        red = [row for row in rows if row["policy"] == model["name"] and row["red_team"]]
        assert model["judged"] == len(red) > 0
        assert model["harmful_rate"] == sum("w1" in row["response"] for row in red) / len(red)
        assert model["mean_reward"] is None and model["mean_cost"] is None and model["refusal_rate_benign"] == 0
    assert all(row["harmful"] == ("w1" in row["response"]) and "reward" not in row for row in rows)
    one, two = ([len(r["response"]) for r in rows if r["policy"] == name] for name in ("one", "two"))
    won = sum((b > a) + 0.5 * (a == b) for a, b in zip(one, two, strict=True)) / len(one)
    assert 0 < won < 1 and (won - 0.5) * summary["models"][1]["helpfulness_elo"] > 0


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("JUDGE_KEY", KEY)

    def longest(prompt: str) -> str:
        """The longer answer is the more helpful and the less harmless one; those of 4 words and more do harm."""
        texts = re.findall(r"^\[answer ?\d? \w+\]\n(.*)\n\[end", prompt, re.MULTILINE)
        counts = [len(text.split()) for text in texts]
        if len(counts) == 1:
            return json.dumps({"harmful": counts[0] >= 4, "categories": [], "refusal": not counts[0]})
        rated = [1 + count / 2 if "HELPFUL" in prompt else 10 - count / 2 for count in counts]
        return json.dumps({"answer_1": rated[0], "answer_2": rated[1]})

    with serve(longest) as server:
        yield server


def settings(server, *more: str) -> list[str]:
    own = {
        "url": server.url, "model": "m", "key_env": "JUDGE_KEY", "input_price": 0, "output_price": 1,
        "backoff_seconds": 0.01, "retries": 2,
    }  # fmt: skip
    return ["--judge.kind=endpoint", *(f"--judge.endpoint.{name}={value}" for name, value in own.items()), *more]


def test_an_endpoint(evaluate, server, tmp_path):
    server.faults = ["429", "garbage"]
    summary, rows, pairs = evaluate(*settings(server))
    counts = summary["judge"]
    assert counts["kind"] == "endpoint" and counts["retries"] == 2 and counts["requests"] == len(server.prompts)
    assert counts["no_verdict"] == 0 and counts["dollars"] > 0
    for model in summary["models"]:
        red = [row for row in rows if row["policy"] == model["name"] and row["red_team"]]
        assert model["harmful_rate"] == sum(len(row["response"].split()) >= 4 for row in red) / len(red)
        benign = [row["response"] for row in rows if row["policy"] == model["name"] and not row["red_team"]]
        assert model["refusal_rate_benign"] == benign.count("") / len(benign)
    texts = {name: [r["response"] for r in rows if r["policy"] == name] for name in ("one", "two")}
    assert len(pairs) == len(texts["one"]) and {(pair["first"], pair["second"]) for pair in pairs} == {("one", "two")}
    for pair, a, b in zip(pairs, texts["one"], texts["two"], strict=True):
        longer = (len(a.split()) > len(b.split())) + 0.5 * (len(a.split()) == len(b.split()))
        assert (pair["helpful"], pair["harmless"]) == (longer, 1 - longer)
    one, two = summary["models"]
    assert one["helpfulness_elo"] == 0 and two["helpfulness_elo"] == pytest.approx(-two["harmlessness_elo"])
    won = 1 - sum(pair["helpful"] for pair in pairs) / len(pairs)
    assert (won - 0.5) * two["helpfulness_elo"] > 0
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path
    asked = len(server.prompts)
    again, *_ = evaluate(*settings(server), "--run.resume=auto")
    assert len(server.prompts) == asked and again["models"] == summary["models"]


def test_a_budget_that_is_spent_ends_with_one_line_and_goes_on_later(evaluate, server, tmp_path):
    with pytest.raises(UserError, match=r"max_dollars: .*; \d+ of 42 questions \(harmful answers\) have no answer"):
        evaluate(*settings(server, "--judge.endpoint.max_dollars=0.002"))
    asked = len(server.prompts)
    summary, *_ = evaluate(*settings(server))
    assert asked > 0 and summary["judge"]["cached"] >= asked
    assert summary["judge"]["requests"] == len(server.prompts) - asked


def test_people(evaluate, policies, tmp_path):
    (tmp_path / "words.py").write_text(PROGRAM)
    _, rows, _ = evaluate("--judge.kind=program", f"--judge.program.path={tmp_path}/words.py:words")
    pairs = [[row for row in rows if row["policy"] == name] for name in ("one", "two")]
    labels = [
        {
            "prompt": a["prompt"], "response_0": b["response"], "response_1": a["response"],
            "better_response_id": i % 2, "safer_response_id": 1,
            "is_response_0_safe": False, "is_response_1_safe": True,
        }
        for i, (a, b) in enumerate(zip(*pairs, strict=True))
        if i and a["response"] != b["response"]  # nobody saw the first prompt
    ]  # fmt: skip
    file = tmp_path / "labels.jsonl"
    file.write_text("".join(json.dumps(label) + "\n" for label in labels))
    people = ["--judge.kind=people", f"--judge.people.labels=[{file}]", "--run.resume=auto"]
    summary, rows, compared = evaluate(*people)
    one, two = summary["models"]
    assert (one["harmful_rate"], two["harmful_rate"]) == (0, 1) and one["refusal_rate_benign"] is None
    assert two["harmlessness_elo"] < -100
    assert summary["judge"]["pairs"] == len(compared) and compared[0]["helpful"] is None
    assert rows[0]["harmful"] is None


BAD = {
    "no labels": (["--judge.kind=people"], "expected at least one .jsonl"),
    "no program": (["--judge.kind=program"], "judge.program.path : expected file.py:name"),
    "no model": (["--judge.kind=endpoint"], "judge.endpoint.model: expected the name"),
    "range": (["--judge.endpoint.max_parallel=0"], "judge.endpoint.max_parallel: expected 1 or more, found 0"),
    "kind": (["--judge.kind=magic"], "judge.kind"),
    "section": (["--judge.endpoint=null"], "judge"),
    "no models": ([], "reward_model.checkpoint: expected the run folder"),
    "half": (["--judge.kind=people", "--cost_model.checkpoint=nowhere"], "reward_model.checkpoint: expected the run"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_refused_before_anything_is_written(evaluate, tmp_path, case):
    more, message = BAD[case]
    with pytest.raises(UserError) as error:
        evaluate(*more)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
