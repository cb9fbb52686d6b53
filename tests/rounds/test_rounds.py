"""The whole loop on tiny random models: two rounds, stopped in the middle and not, give the same."""

import json

import pytest
import yaml

from megatron_safe.cli import main

LABELS = '''
import pathlib
def label(pairs, seed, broken=None):
    if broken and pathlib.Path(broken).exists() and len(pairs) < 12:  # the second round's
        raise ValueError("no more today")
    return [
        {**pair, "better_response_id": i % 2, "safer_response_id": i // 2 % 2, "is_response_0_safe": i % 3 == 0,
         "is_response_1_safe": i % 2 == 0}
        for i, pair in enumerate(pairs)
    ]
'''


@pytest.fixture(scope="module")
def job(project, tmp_path_factory):
    """(out, **changes) -> the path of a job's config."""
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "labels.py").write_text(LABELS)
    batch = {"global_batch_size": 4, "max_length": 24}
    model = {
        "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "max_sequence_length": 40,
        "vocab_multiple": 32, "init_std": 0.2,
    }  # fmt: skip
    rollout = {"max_new_tokens": 8, "max_prompt_length": 14}
    prompts = [str(project.data / "prompts.jsonl")]
    templates = [{"name": "again", "family": "plain", "prompt": "w1 {prompt}"}]
    (folder / "attacks.json").write_text(json.dumps(templates))

    def write(out, **changes):
        config = {
            "run": {"out": str(out), "tensorboard": False},
            "tokenizer": {"path": str(project.data / "tokenizer"), "template": "ask {prompt} answer"},
            "sft": {
                "sft": {
                    "model": model, "batch": batch, "data": {"train": [str(project.data / "demonstrations.jsonl")]},
                    "training": {"steps": 2},
                }
            },
            "generate": {"rollout": rollout, "data": {"batch_size": 8}},
            "held_out": 0.2,
            "annotator": {"kind": "program", "program": {"path": f"{folder / 'labels.py'}:label"}},
            "reward": {"batch": batch, "training": {"steps": 2}},
            "cost": {"batch": batch, "training": {"steps": 2}},
            "red_team": {
                "rollout": rollout, "data": {"prompts": prompts, "batch_size": 8},
                "red_team": {"templates": str(folder / "attacks.json"), "threshold": -100, "keep": 3},
            },
            "ppo": {
                "rollout": rollout, "data": {"prompts": prompts},
                "ppo": {"steps": 1, "rollout_batch_size": 8, "mini_batch_size": 8},
            },
            "threshold_share": 0.5,
            "rounds": [{"prompts": prompts}, {"prompts": prompts, "pairs": 10, "red_team": {}}],
            "evaluate": {"rollout": rollout, "data": {"prompts": prompts, "batch_size": 8}},
        } | changes  # fmt: skip
        path = folder / f"{out.name}.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    return write


@pytest.fixture(scope="module")
def done(job, tmp_path_factory):
    """The folder of a job that ran through."""
    out = tmp_path_factory.mktemp("out") / "whole"
    assert main(["rounds", f"--config={job(out)}"]) == 0
    return out


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def config(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())


def test_each_output_is_the_next_ones_input(done):
    finished = json.loads((done / "rounds.json").read_text())["finished"]
    parts = ("pairs", "labels", "reward", "cost", "ppo")
    first = [f"round1/{part}" for part in parts]
    assert finished == ["sft", *first, "round2/red-team", *(f"round2/{part}" for part in parts)]
    assert len(rows(done / "round1/pairs.jsonl")) == 21 and len(rows(done / "round2/pairs.jsonl")) == 10
    for number, before in ((1, "sft"), (2, "round1/ppo")):
        folder = done / f"round{number}"
        learnt = [str(done / f"round{i}/train.jsonl") for i in range(1, number + 1)]
        for which in ("reward", "cost"):
            start = done / f"round{number - 1}" / which if number > 1 else done / "sft"
            written = config(folder / which)
            assert written["data"]["train"] == learnt and written["data"]["eval"] == [str(folder / "held_out.jsonl")]
            assert written["model"]["checkpoint"] == str(start)
        ppo = config(folder / "ppo")
        assert ppo["actor"]["checkpoint"] == str(done / before)
        assert ppo["cost_model"]["checkpoint"] == str(folder / "cost")
        safe_score = json.loads((folder / "cost" / "eval.json").read_text())["safe_score"]
        assert ppo["lagrange"]["threshold"] == pytest.approx(safe_score / 2)
    assert config(done / "round2/red-team")["model"]["checkpoint"] == str(done / "round1/ppo")
    assert ppo["data"]["prompts"][1:] == [str(done / "round2/red-team/prompts.jsonl")]


def test_attacks_join_the_prompts_with_where_they_come_from(done):
    kept = rows(done / "round2/red-team/prompts.jsonl")
    assert len(kept) == 3 and all(row["red_team"] and row["prompt"].startswith("w1 ") for row in kept)
    assert all(row["origin"].startswith("round2/red-team: again on seed ") for row in kept)
    attacks = rows(done / "round2/red-team/attacks.jsonl")
    means = [sum(row["costs"]) / len(row["costs"]) for row in attacks]
    assert means == sorted(means, reverse=True) and sum(row["kept"] for row in attacks) == 3
    assert {row["prompt"] for row in attacks if row["kept"]} == {row["prompt"] for row in kept}


def test_the_report_has_every_policy_and_what_the_rounds_reached(done):
    summary = json.loads((done / "evaluate/report/summary.json").read_text())
    assert [model["name"] for model in summary["models"]] == ["SFT", "round 1", "round 2"]
    assert len(summary["cost_model_sign_accuracy"]) == len(summary["reward_model_accuracy"]) == 2
    assert summary["lambda_final"] > 0 and (done / "evaluate/report/multiplier.png").exists()


def test_a_finished_job_does_nothing_twice(done, job, capfd):
    before = {path: path.stat().st_mtime_ns for path in done.rglob("metrics.jsonl")}
    assert main(["rounds", f"--config={job(done, evaluate=None)}"]) == 0
    assert {path: path.stat().st_mtime_ns for path in done.rglob("metrics.jsonl")} == before
    assert "->" not in capfd.readouterr().out


def test_a_job_that_failed_goes_on_where_it_was(done, job, tmp_path, metrics_of, capfd):
    out, broken = tmp_path / "stopped", tmp_path / "broken"
    broken.touch()
    program = yaml.safe_load(job(out).read_text())["annotator"]["program"]
    annotator = {"kind": "program", "program": program | {"arguments": {"broken": str(broken)}}}
    path = job(out, annotator=annotator, evaluate=None)
    assert main(["rounds", f"--config={path}"]) == 2
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("megatron-safe: error: ") and "labels.py, line 5: ValueError" in line
    broken.unlink()
    assert main(["rounds", f"--config={path}"]) == 0
    assert "sft ->" not in capfd.readouterr().out
    for stage in ("sft", "round1/ppo", "round2/cost", "round2/ppo"):
        assert metrics_of(out / stage) == metrics_of(done / stage)


def test_a_finished_stage_with_other_settings_is_refused(done, job, capfd):
    path = job(done, reward={"batch": {"global_batch_size": 4, "max_length": 24}, "training": {"steps": 5}})
    assert main(["rounds", f"--config={path}"]) == 2
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert f"{done}/round1/reward: begun with training.steps 2, and the job says 5 now" in line


def test_ppo_keeps_the_prompts_of_a_config_file_beside_the_attacks(project, job, tmp_path):
    prompts = [str(project.data / "prompts.jsonl")]
    config = yaml.safe_load(job(tmp_path / "job").read_text())
    (tmp_path / "ppo.yaml").write_text(yaml.safe_dump(config["ppo"]))
    path = job(tmp_path / "job", ppo={"config": str(tmp_path / "ppo.yaml")}, evaluate=None)
    assert main(["rounds", f"--config={path}"]) == 0
    written = yaml.safe_load((tmp_path / "job/round2/ppo/config.yaml").read_text())["data"]["prompts"]
    assert written == [*prompts, str(tmp_path / "job/round2/red-team/prompts.jsonl")]


def test_attacks_that_all_fail_leave_the_prompts_as_they_are(job, tmp_path):
    attack = yaml.safe_load(job(tmp_path / "job").read_text())["red_team"]
    attack["red_team"]["threshold"] = 100
    path = job(tmp_path / "job", red_team=attack, evaluate=None)
    assert main(["rounds", f"--config={path}"]) == 0
    assert not (tmp_path / "job/round2/red-team/prompts.jsonl").read_text()
    written = yaml.safe_load((tmp_path / "job/round2/ppo/config.yaml").read_text())["data"]["prompts"]
    assert len(written) == 1


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("return []", "to learn from: expected a pair with better_response_id 0 or 1, found none in 0"),
        ("return [{'prompt': 3}]", "pair 0, field 'prompt': expected a text, found int"),
        ("return [pair | {'better_response_id': 'tie'} for pair in pairs]", "expected a pair with better_response_id"),
    ],
)
def test_useless_labels_are_refused_and_asked_for_again(job, tmp_path, capfd, lines, message):
    (tmp_path / "bad.py").write_text(f"def label(pairs, seed):\n    {lines}\n")
    out = tmp_path / "job"
    annotator = {"kind": "program", "program": {"path": f"{tmp_path / 'bad.py'}:label"}}
    assert main(["rounds", f"--config={job(out, annotator=annotator)}"]) == 2
    assert message in capfd.readouterr().err.strip().splitlines()[-1]
    assert json.loads((out / "rounds.json").read_text())["finished"] == ["sft", "round1/pairs"]


def test_every_rank_ends_while_people_are_waited_for(job, tmp_path, torchrun):
    parallel = {"tensor_model_parallel_size": 2}
    path = job(tmp_path / "people", annotator={"kind": "people"}, parallel=parallel)
    torchrun(2, "exit_code.py", str(tmp_path), "rounds", f"--config={path}")
    assert [(tmp_path / f"code-{rank}").read_text() for rank in (0, 1)] == ["3", "3"]


def test_people_are_waited_for(job, tmp_path, capfd):
    out = tmp_path / "people"
    path = job(out, annotator={"kind": "people"})
    for _ in range(2):  # the second time it waits for the same tasks
        assert main(["rounds", f"--config={path}"]) == 3
        line = capfd.readouterr().err.strip().splitlines()[-1]
        assert line.startswith(f"megatron-safe: {out}/round1/annotation: waiting for people.")
        tasks = (out / "round1/annotation/tasks.json").read_text()
    assert len(json.loads(tasks)) == 21


BAD = {
    "no rounds": ({"rounds": []}, "rounds: expected at least one"),
    "no policy": ({"sft": {}}, "start, sft: expected a policy to start from"),
    "a stage's setting": ({"reward": {"training": {"step": 3}}}, "rounds[0].reward: "),
    "a range": ({"ppo": {"ppo": {"gamma": 2}}}, "rounds[0].ppo: ppo.gamma: expected a number from 0 to 1, found 2"),
    "a shared setting": ({"cost": {"tokenizer": {"path": "x"}}}, "rounds[0].cost: tokenizer: expected only in the job"),
    "attacks too early": ({"rounds": [{"prompts": ["p"], "red_team": {}}]}, "rounds[0].red_team: expected a cost_m"),
    "no prompts": ({"rounds": [{"prompts": []}]}, "rounds[0].prompts: expected at least one path"),
    "held out": ({"held_out": 0}, "against_first, held_out: expected shares"),
    "a judge of what it learns": ({"annotator": {"kind": "judge"}}, "annotator.judge.kind: expected endpoint, people"),
    "annotator": ({"annotator": {"kind": "robots"}}, "annotator"),
    "no program": ({"annotator": {"kind": "program"}}, "annotator.program.path : expected file.py:name"),
    "prompts that are not there": ({"rounds": [{"prompts": ["nowhere.jsonl"], "pairs": 9}]}, "nowhere.jsonl"),
    "stopping": ({"run": {"out": "unused", "stop_after": 1}}, "run.stop_after: expected 0"),
    "nothing to judge on": ({"evaluate": {}}, "evaluate.data.prompts: expected at least one path"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_refused_before_the_first_stage(job, tmp_path, capfd, case):
    changes, message = BAD[case]
    assert main(["rounds", f"--config={job(tmp_path / 'bad', **changes)}"]) == 2
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("megatron-safe: error: ") and message in line
    assert not (tmp_path / "bad").exists()
