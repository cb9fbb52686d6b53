"""The quickstart in miniature, started as a user starts it."""

import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def start(*arguments: str) -> subprocess.CompletedProcess:
    command = ["bash", str(ROOT / "examples/quickstart/run.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("quickstart") / "run"
    result = start("--out", str(out), "--rounds", "1", "--scale", "0.02", "--layout", "tp2")
    assert result.returncode == 0, result.stderr[-3000:]
    return out, result


def test_prints_the_table_and_writes_the_report(run):
    out, result = run
    summary = json.loads((out / "evaluate/report/summary.json").read_text())
    assert (summary["seed"], summary["layout"]) == (0, "tp2pp1dp1")
    assert [model["name"] for model in summary["models"]] == ["SFT", "round 1"]
    for model in summary["models"]:
        assert 0 <= model["harmful_rate"] <= 1
        assert set(model) >= {"harmful_rate_by_category", "helpfulness_elo", "harmlessness_elo", "mean_cost"}
        assert f"{model['harmful_rate']:.1%}" in result.stdout
    for key in ("reward_model_accuracy", "cost_model_accuracy", "cost_model_sign_accuracy"):
        assert len(summary[key]) == 1
    assert summary["lambda_final"] > 0
    assert {path.name for path in (out / "evaluate/report").iterdir()} >= {"index.html", "models.png", "multiplier.png"}


def test_every_stage_is_a_run_of_its_own(run):
    out, _ = run
    for stage in ("pretrain", "sft", "round1/reward", "round1/cost", "round1/ppo"):
        assert (out / stage / "config.yaml").exists()
        steps = [json.loads(line)["step"] for line in (out / stage / "metrics.jsonl").open()]
        assert steps == list(range(1, len(steps) + 1))


def test_a_used_folder_is_refused_and_can_be_resumed(run):
    out, first = run
    refused = start("--out", str(out))
    assert refused.returncode == 2
    message = refused.stderr.strip().splitlines()[-1]
    assert message == f"quickstart: error: --out {out}: holds a run already; choose another folder, or add --resume"
    resumed = start("--out", str(out), "--rounds", "1", "--scale", "0.02", "--resume")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    table = [line for line in first.stdout.splitlines() if line.startswith(("SFT", "round 1"))]
    assert [line for line in resumed.stdout.splitlines() if line.startswith(("SFT", "round 1"))] == table


def test_unknown_layout_is_refused():
    result = start("--layout", "tp3")
    assert result.returncode == 2
    assert "tp3" in result.stderr and "Traceback" not in result.stderr
