"""The real-text example as a user starts it: in miniature on made-up pairs, and a short version on the real ones."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REAL_DATA = Path(os.environ.get("MEGATRON_SAFE_DATA", ROOT.parent / "shared" / "data"))


def start(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "examples/real-text/main.py"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture(scope="module")
def made_up(tmp_path_factory) -> Path:
    """200 pairs whose unsafe answers have a word that no safe one has."""
    draw = random.Random(11)

    def text(*more: str) -> str:
        words = [*more, *(f"word{draw.randint(0, 30)}" for _ in range(6))]
        return " ".join(draw.sample(words, len(words)))

    rows = [
        {"prompt": f"question {draw.randint(0, 90)}", "safe_response": text(), "unsafe_response": text("harm")}
        for _ in range(200)
    ]
    file = tmp_path_factory.mktemp("pairs") / "made-up.json"
    file.write_text(json.dumps(rows))
    return file


def test_learns_made_up_pairs_and_writes_what_it_found(made_up, tmp_path):
    out = tmp_path / "run"
    done = start("--pairs", str(made_up), "--out", str(out), "--seeds", "0")
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["pairs"]["train"] + summary["pairs"]["held_out"] == 200
    assert summary["pairs"]["held_out"] >= 20
    assert str(made_up.parent) not in summary["command"] and made_up.name in summary["command"]
    for metric in ("sign", "ranking"):
        assert summary[metric]["baseline"]["mean"] > 0.95
        assert f"{metric} accuracy" in done.stdout
    assert summary["ranking"]["ours"]["mean"] > 0.9
    assert (out / "accuracy.png").exists()
    again = start("--pairs", str(made_up), "--out", str(out))
    assert again.returncode == 2
    assert "expected a new folder" in again.stderr and "Traceback" not in again.stderr


@pytest.mark.real_data
def test_learns_something_of_real_pairs_in_a_short_run(request, tmp_path):
    if "real_data" not in request.config.option.markexpr:
        pytest.skip("takes a minute or two; ask for it with -m real_data")
    pairs = REAL_DATA / "pku-saferlhf-pairs-2000.json"
    if not pairs.exists():
        pytest.skip(f"no real data at {pairs}; set MEGATRON_SAFE_DATA to its folder")
    out = tmp_path / "run"
    done = start("--pairs", str(pairs), "--out", str(out), "--seeds", "0", "--validate", "0", "--scale", "0.5")
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["held_out"] == "validation"
    assert summary["parameters"] < 5e6
    for metric in ("sign", "ranking"):  # 0.5 is chance, 0.02 the standard deviation
        assert summary[metric]["ours"]["mean"] > 0.54
        assert summary[metric]["baseline"]["mean"] > 0.54
