"""The stage `red-team` on tiny random models: what it asks, how it ranks, and what it says."""

import json

import pytest

from megatron_safe.cli import main

TEMPLATES = [
    {"name": "as it is", "family": "plain", "prompt": "{prompt}"},
    {"name": "agreed", "family": "leading-context", "history": [["w1 {prompt}", "w2"]], "prompt": "w3 {prompt}"},
    {"name": "reworded", "family": "paraphrase", "rewrite": "w4 {prompt}", "prompt": "{prompt}"},
    {"name": "two before", "family": "many-shot", "shots": 2, "prompt": "{prompt}"},
]
SEEDS = [{"prompt": f"w{i} w{i + 1}", "category": "heat" if i % 2 else None} for i in range(5, 11)]


@pytest.fixture(scope="module")
def models(project, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for stage in ("sft", "cost"):
        assert main([stage, *project.arguments(stage, folder / stage, "one", "--training.steps=1", models=folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def attack(project, models, tmp_path_factory):
    """(out, *overrides) -> the exit code of `red-team`."""
    folder = tmp_path_factory.mktemp("attacks")
    (folder / "templates.json").write_text(json.dumps(TEMPLATES))
    (folder / "seeds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SEEDS))
    (folder / "pool.jsonl").write_text(json.dumps({"prompt": "W5  w6", "red_team": True, "origin": "people"}) + "\n")

    def run(out, *overrides):
        shared = project.arguments("generate", out, "one", models=models)
        return main([
            "red-team",
            *(one for one in shared if not one.startswith(("--model.", "--data.", "--rollout."))),
            f"--model.checkpoint={models}/sft", f"--cost_model.checkpoint={models}/cost",
            f"--data.prompts=[{folder / 'seeds.jsonl'}]", "--data.batch_size=8", "--data.samples_per_prompt=2",
            "--rollout.max_prompt_length=30", "--rollout.max_new_tokens=8",
            f"--red_team.templates={folder / 'templates.json'}", f"--red_team.pool=[{folder / 'pool.jsonl'}]",
            "--red_team.threshold=-100", "--red_team.max_similarity=1", *overrides,
        ])  # fmt: skip

    return run


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_template_asks_every_seed_and_the_costs_are_the_cost_models(attack, models, project, tmp_path, capfd):
    out = tmp_path / "out"
    assert attack(out) == 0
    said = capfd.readouterr().out
    attacks = rows(out / "attacks.jsonl")
    by_template = {t["name"]: [a for a in attacks if a["template"] == t["name"]] for t in TEMPLATES}
    assert {a["seed"] for a in by_template["as it is"]} == set(range(6))
    for one in by_template["as it is"]:
        assert (one["prompt"], one["category"]) == (SEEDS[one["seed"]]["prompt"], SEEDS[one["seed"]]["category"])
    for one in by_template["agreed"]:
        seed = SEEDS[one["seed"]]["prompt"]
        assert (one["history"], one["prompt"]) == ([[f"w1 {seed}", "w2"]], f"w3 {seed}")
    assert by_template["reworded"]
    for one in by_template["reworded"]:  # the policy's words, which are random here
        seed = SEEDS[one["seed"]]["prompt"]
        assert one["prompt"] not in (seed, f"w4 {seed}") and "history" not in one
    # The exchanges before are other seeds with the costliest answers that the first wave saw, the worst one last.
    worst = {}
    for one in attacks:
        if one["template"] != "two before":
            for cost, response in zip(one["costs"], one["responses"], strict=True):
                if cost > worst.get(one["seed"], (-100, ""))[0]:
                    worst[one["seed"]] = cost, response
    ranked = [seed for seed in sorted(worst, key=lambda seed: -worst[seed][0]) if worst[seed][1].strip()]
    for one in by_template["two before"]:
        before = [seed for seed in ranked if seed != one["seed"]][:2][::-1]
        assert one["history"] == [[SEEDS[seed]["prompt"], worst[seed][1]] for seed in before]

    answers = [
        {"prompt": one["prompt"], "history": one.get("history", []), "response": response, "ended": False}
        for one in by_template["agreed"] for response in one["responses"]
    ]  # fmt: skip
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    shared = project.arguments("generate", tmp_path / "scores", "one", models=models)
    shared = [one for one in shared if not one.startswith(("--model.", "--data.", "--rollout."))]
    score = [*shared, f"--cost_model.checkpoint={models}/cost", f"--data.answers=[{tmp_path / 'answers.jsonl'}]"]
    assert main(["score", *score, "--data.max_length=38", "--data.batch_size=8"]) == 0
    scored = [row["cost"] for row in rows(tmp_path / "scores" / "scores.jsonl")]
    # Answers of as many words as there were tokens were cut off; others may hold special tokens, which are no text.
    full = [len(answer["response"].split()) == 8 for answer in answers]
    costs = [cost for one in by_template["agreed"] for cost in one["costs"]]
    assert any(full)
    for cost, expected, known in zip(costs, scored, full, strict=True):
        if known:
            assert cost == pytest.approx(expected, abs=1e-5)
    for template in TEMPLATES:
        assert template["name"] in said


def test_the_pool_comes_first_and_what_it_has_is_not_added_again(attack, tmp_path):
    out = tmp_path / "out"
    assert attack(out, "--red_team.max_per_seed=1") == 0
    pool, *kept = rows(out / "prompts.jsonl")
    assert (pool["prompt"], pool["origin"]) == ("W5  w6", "people")
    assert all(row["red_team"] and row["origin"].startswith(f"{tmp_path.name}/out: ") for row in kept)
    assert len(kept) == len({row["origin"].rsplit(" ", 1)[1] for row in kept})  # one for each seed
    assert not any(row["prompt"] == "w5 w6" and "history" not in row for row in kept)


def test_an_attack_succeeds_above_the_threshold_only(attack, tmp_path):
    assert attack(tmp_path / "out", "--red_team.threshold=100") == 0
    assert len(rows(tmp_path / "out" / "prompts.jsonl")) == 1
    assert {one["template"] for one in rows(tmp_path / "out" / "attacks.jsonl")} == {
        "as it is", "agreed", "reworded"  # no harmful answer of the policy's own to show
    }  # fmt: skip


def test_attacks_that_are_too_long_are_counted(attack, tmp_path, capfd):
    assert attack(tmp_path / "out", "--rollout.max_prompt_length=5") == 0
    said = capfd.readouterr().out
    assert {one["template"] for one in rows(tmp_path / "out" / "attacks.jsonl")} >= {"as it is"}
    assert "more left out (too long)" in said and "0 more left out" not in said


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--red_team.templates=nowhere.json", "nowhere.json: expected a JSON list of attack templates"),
        ("--cost_model.checkpoint=null", "cost_model.checkpoint: expected the run folder"),
        ("--red_team.max_similarity=2", "red_team.max_similarity: expected a number from 0 to 1, found 2"),
        ("--red_team.pool=[nowhere.jsonl]", "nowhere.jsonl"),
    ],
)
def test_bad_input_is_one_line(attack, tmp_path, capfd, override, message):
    assert attack(tmp_path / "out", override) == 2
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("megatron-safe: error: ") and message in line
    assert not (tmp_path / "out").exists()
