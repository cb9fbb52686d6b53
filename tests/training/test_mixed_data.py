"""Stages on entries with weights, labels that are missing, and bad rows: what they print, and that they resume."""

import json

import pytest

from megatron_safe.cli import main


@pytest.fixture
def stage(project, tmp_path, capfd):
    """stage(name, folder, *overrides): exit code and all lines of a run on one process."""

    def run(name, out, *overrides):
        code = main([name, *project.arguments(name, tmp_path / out, "one", *overrides, models=tmp_path)])
        said = capfd.readouterr()
        return code, (said.out + said.err).splitlines()

    return run


def rows_of(project, name):
    return [json.loads(line) for line in (project.data / f"{name}.jsonl").read_text().splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_weighted_run_goes_on_as_if_it_had_not_stopped(project, stage, metrics_of, tmp_path):
    pairs = [
        {"prompt": row["prompt"], "input": "", "instruction": row["prompt"], "output": row["response"]}
        for row in rows_of(project, "demonstrations")[:11]
    ]
    alpaca = write(tmp_path / "alpaca.json", pairs)
    plain = project.data / "demonstrations.jsonl"
    mixed = f"--data.train=[{{path: {plain}, weight: 0.3}},{{path: {alpaca}, source: alpaca, weight: 0.7}}]"
    assert stage("sft", "whole", mixed)[0] == 0
    assert stage("sft", "parts", mixed, "--run.stop_after=2")[0] == 0
    assert stage("sft", "parts", mixed, "--run.resume=auto", "--run.stop_after=0")[0] == 0
    whole, parts = metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "parts")
    assert [line["step"] for line in parts] == [1, 2, 3, 4]
    assert [line["loss"] for line in parts] == pytest.approx([line["loss"] for line in whole], rel=1e-6)
    assert stage("sft", "alike", f"--data.train=[{plain},{{path: {alpaca}, source: alpaca}}]")[0] == 0
    assert [line["loss"] for line in metrics_of(tmp_path / "alike")] != [line["loss"] for line in whole]


def test_each_model_learns_from_the_rows_that_have_its_label(project, stage, tmp_path):
    assert stage("sft", "sft", "--training.steps=1")[0] == 0
    rows = rows_of(project, "comparisons")
    for n, row in enumerate(rows):
        row |= {"better_response_id": None} if n < 4 else {"safer_response_id": None} if n < 10 else {}
    data = write(tmp_path / "pairs.jsonl", [*rows, {"prompt": "w1"}])
    entries = f"--data.train=[{data}]"
    for name, label, missing in (("reward", "better_response_id", 4), ("cost", "safer_response_id", 6)):
        code, lines = stage(name, f"{name}-fails", entries, "--training.steps=1")
        assert code == 2 and f"{data}, line 31, field 'response_0': expected a string" in lines[-1]
        code, lines = stage(name, name, entries, "--training.steps=1", "--data.on_bad_row=skip")
        assert code == 0
        assert f"data.train[0] {data}: {missing} of 30 comparisons have no {label}, left out" in lines
        assert any("1 bad rows skipped, field 'response_0'" in line and "line 31" in line for line in lines)
    data = write(tmp_path / "none.jsonl", [row | {"safer_response_id": None} for row in rows])
    code, lines = stage("cost", "none", f"--data.train=[{data}]")
    assert code == 2 and f"data.train[0] {data}: expected comparisons with safer_response_id, found none" in lines[-1]
