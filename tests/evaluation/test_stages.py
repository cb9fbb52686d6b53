"""Answers, scores and the stages that write them, in one process on tiny random models."""

import dataclasses
import json
import math
import os
import subprocess
import sys

import pytest
import torch
import yaml
from whole_rows import outputs

from megatron_safe.cli import parse, run_stage
from megatron_safe.config import ModelConfig, ParallelConfig, RolloutConfig
from megatron_safe.data.batches import encode_dialogue, encode_prompt
from megatron_safe.data.records import Prompt
from megatron_safe.errors import UserError
from megatron_safe.evaluation.answers import Answer, generate_answers, score_answers
from megatron_safe.evaluation.judges import ModelJudge
from megatron_safe.runtime import start
from megatron_safe.training.setup import make_role

TEMPLATE = "ask {prompt} say"
TINY = ModelConfig(
    num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2,
    max_sequence_length=64, vocab_multiple=8, init_std=0.4,
)  # fmt: skip
PROMPTS = [
    Prompt("water the fern", red_team=False, category=None),
    Prompt("boil rice", red_team=True, category="heat"),
    Prompt("how to sweep the floor twice a week please", red_team=True, category="dust"),
    Prompt("warm the lamp", red_team=True, category="heat"),
    Prompt("is the fern green", red_team=False, category=None),
    Prompt("the", red_team=False, category=None),
    Prompt("please water a green lamp to warm the floor", red_team=True, category="dust"),
]
ROLLOUT = RolloutConfig(max_new_tokens=6, max_prompt_length=16)


@pytest.fixture(scope="module")
def runtime():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with start(ParallelConfig(), 0) as runtime:
        yield runtime
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def roles(runtime, tokenizer):
    seeds = {"actor": 1, "reward_model": 2, "cost_model": 3}
    return {
        name: make_role(name, TINY, "fp32", seed, tokenizer, runtime, resume=None) for name, seed in seeds.items()
    }


@pytest.fixture
def answer(roles, tokenizer):
    """`generate_answers` of the tiny actor, with what a test does not care about filled in."""

    def run(records=PROMPTS, rollout=ROLLOUT, batch_size=4, samples_per_prompt=1, seed=5):
        return generate_answers(
            roles["actor"], records, tokenizer, TEMPLATE, rollout, batch_size, samples_per_prompt, seed
        )

    return run


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# Answers.


def test_answers_come_in_the_order_of_the_prompts_with_what_is_known_of_them(answer):
    answers = answer(samples_per_prompt=3)
    expected = [(p.prompt, p.red_team, p.category, s) for p in PROMPTS for s in range(3)]
    assert [(a.prompt, a.red_team, a.category, a.sample) for a in answers] == expected
    assert {a.ended for a in answers} == {True, False}  # else the test below sees one kind only
    assert len({a.response for a in answers}) > len(PROMPTS)


def test_ended_answers_are_short_and_the_others_full(answer, tokenizer):
    for given_answer in answer(samples_per_prompt=8):
        tokens = tokenizer.encode(given_answer.response)
        assert tokenizer.eos_id not in tokens
        # Special tokens are not text, so a response may hold fewer words than tokens.
        assert len(tokens) <= ROLLOUT.max_new_tokens - given_answer.ended


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_texts_do_not_depend_on_the_batch_size(answer, temperature):
    rollout = dataclasses.replace(ROLLOUT, temperature=temperature)
    whole = answer(rollout=rollout, batch_size=64, samples_per_prompt=2)
    for batch_size in (1, 3, 4):
        assert answer(rollout=rollout, batch_size=batch_size, samples_per_prompt=2) == whole


def test_a_seed_gives_its_own_texts(answer):
    assert answer(seed=5) == answer(seed=5)
    assert answer(seed=5) != answer(seed=6)


def test_greedy_is_the_likeliest_token_of_a_full_forward(answer, roles, tokenizer):
    greedy = dataclasses.replace(ROLLOUT, temperature=0.0)
    answers, actor = answer(rollout=greedy, samples_per_prompt=2), roles["actor"].module
    assert [a.response for a in answers[::2]] == [a.response for a in answers[1::2]]
    for prompt, given_answer in zip(PROMPTS, answers[::2], strict=True):
        tokens = encode_prompt(tokenizer, TEMPLATE, prompt.prompt)
        ids = []
        while len(ids) < ROLLOUT.max_new_tokens and tokenizer.eos_id not in ids:
            with torch.no_grad():
                logits_V = outputs(actor, torch.tensor([tokens + ids]))[0, -1]
            ids.append(int(logits_V.argmax()))
        assert given_answer.ended == (ids[-1] == tokenizer.eos_id)
        assert given_answer.response == tokenizer.decode([i for i in ids if i != tokenizer.eos_id])


def test_too_long_prompts_are_left_out_and_said_to_be(answer, capfd):
    short = dataclasses.replace(ROLLOUT, max_prompt_length=7)
    kept = [p for p in PROMPTS if len(p.prompt.split()) + 3 <= 7]  # BOS, "ask" and "say" go with the words
    assert 0 < len(kept) < len(PROMPTS)
    assert [a.prompt for a in answer(rollout=short)] == [p.prompt for p in kept]
    assert f"kept {len(kept)} of {len(PROMPTS)} rows" in capfd.readouterr().out
    with pytest.raises(UserError, match="expected at least one row with room for a prompt within 2 tokens"):
        answer(rollout=dataclasses.replace(ROLLOUT, max_prompt_length=2))


# Scores.

DIALOGUES = [
    Answer("water the fern", "twice a week"),
    Answer("boil rice", "", ended=True),
    Answer("boil rice", "", ended=False),
    Answer("how to sweep the floor twice a week please", "no no no no no no no no"),
    Answer("the", "lamp is warm", ended=False),
    Answer("water the fern", "twice a week", ended=False),
    Answer("is the fern green", "the fern is green is the fern is green"),
]


def one_by_one(role, answers, tokenizer, max_length):
    """A full forward of each row by itself, read at its last token."""
    scores = []
    for a in answers:
        tokens, prompt_length = encode_dialogue(tokenizer, TEMPLATE, a.prompt, a.response, add_eos=a.ended)
        with torch.no_grad():
            score = float(outputs(role.module, torch.tensor([tokens[:max_length]]))[0, -1])
        scores.append(score if prompt_length < max_length else math.nan)
    return scores


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_scores_are_those_of_each_row_alone_in_the_order_given(roles, tokenizer, batch_size):
    scorers = {name: roles[name] for name in ("reward_model", "cost_model")}
    scores = score_answers(scorers, DIALOGUES, tokenizer, TEMPLATE, 32, batch_size)
    assert list(scores) == ["reward_model", "cost_model"]
    for name, role in scorers.items():
        expected = one_by_one(role, DIALOGUES, tokenizer, 32)
        assert scores[name] == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert len({round(score, 3) for score in scores[name]}) == len(DIALOGUES)  # EOS or none makes a difference


def test_equal_rows_tie_whoever_shares_their_batch(roles, tokenizer):
    doubled = DIALOGUES + DIALOGUES[::-1]
    scores = score_answers({"cost": roles["cost_model"]}, doubled, tokenizer, TEMPLATE, 32, 2)["cost"]
    assert scores[: len(DIALOGUES)] == scores[: len(DIALOGUES) - 1 : -1]
    assert scores[: len(DIALOGUES)] == pytest.approx(
        one_by_one(roles["cost_model"], DIALOGUES, tokenizer, 32), rel=1e-4, abs=1e-5
    )


def test_long_answers_are_cut_and_long_prompts_have_no_score(roles, tokenizer, capfd):
    scorers = {"reward": roles["reward_model"]}
    scores = score_answers(scorers, DIALOGUES, tokenizer, TEMPLATE, 12, 3)["reward"]
    expected = one_by_one(roles["reward_model"], DIALOGUES, tokenizer, 12)
    assert [math.isnan(score) for score in expected] == [False] * 3 + [True] + [False] * 3
    assert scores == pytest.approx(expected, rel=1e-4, abs=1e-5, nan_ok=True)
    assert "scored 6 of 7 rows, up to 12 tokens" in (said := capfd.readouterr().out)
    assert "1 left out (prompt too long), 1 responses cut" in said
    with pytest.raises(UserError, match="fewer than 3 tokens, found none in 7"):
        score_answers(scorers, DIALOGUES, tokenizer, TEMPLATE, 3, 3)
    assert score_answers(scorers, [], tokenizer, TEMPLATE, 12, 3) == {"reward": []}


def test_model_judge_goes_by_the_sign_of_the_cost(roles, tokenizer):
    judge = ModelJudge(roles["reward_model"], roles["cost_model"], tokenizer, TEMPLATE, 32, 4)
    rewards, costs = (one_by_one(roles[n], DIALOGUES, tokenizer, 32) for n in ("reward_model", "cost_model"))
    judgements = judge.judge(DIALOGUES)
    assert [j.helpfulness for j in judgements] == pytest.approx(rewards, rel=1e-4, abs=1e-5)
    assert [j.harm for j in judgements] == pytest.approx(costs, rel=1e-4, abs=1e-5)
    assert [j.harmful for j in judgements] == [cost > 0 for cost in costs]
    assert {j.harmful for j in judgements} == {True, False}
    short = ModelJudge(roles["reward_model"], roles["cost_model"], tokenizer, TEMPLATE, 12, 4)
    with pytest.raises(UserError, match="reward_model: expected a finite score of every answer, found 1 of 7"):
        short.judge(DIALOGUES)


# Stages.


@pytest.fixture(scope="module")
def project(tmp_path_factory, tokenizer_folder, runtime):
    """A folder with data, and what two steps of `sft`, `reward` (from the command line) and `cost` leave."""
    folder = tmp_path_factory.mktemp("project")
    say = ["twice a week", "the lamp is warm", "no", "boil the rice please"]
    texts = [prompt.prompt for prompt in PROMPTS] + ["sweep the floor", "green rice", "a warm week", "no lamp", "is it"]
    write_rows(folder / "sft.jsonl", [{"prompt": p, "response": say[i % 4]} for i, p in enumerate(texts)])
    pairs = [
        {
            "prompt": text,
            "response_0": say[i % 4],
            "response_1": say[(i + 1 + i % 3) % 4],
            "better_response_id": i % 2,
            "safer_response_id": i // 2 % 2,
            "is_response_0_safe": bool(i % 3),
            "is_response_1_safe": bool(i % 4),
        }
        for i, text in enumerate(texts)
    ]
    write_rows(folder / "pairs.jsonl", pairs)
    write_rows(folder / "prompts.jsonl", [dataclasses.asdict(prompt) for prompt in PROMPTS])
    common = {"tokenizer": {"path": str(tokenizer_folder), "template": TEMPLATE}, "run": {"tensorboard": False}}
    shape = {key: value for key, value in dataclasses.asdict(TINY).items() if value is not None}
    batch = {"global_batch_size": 4, "max_tokens_per_micro_batch": 40, "max_length": 32}
    train = {"batch": batch, "training": {"steps": 2}}
    prompts = {"prompts": [str(folder / "prompts.jsonl")], "batch_size": 4}
    short = {"rollout": dataclasses.asdict(ROLLOUT), "data": prompts}
    configs = {
        "sft": train | {"model": shape, "data": {"train": [str(folder / "sft.jsonl")]}},
        "reward": train | {"model": shape, "data": {"train": [str(folder / "pairs.jsonl")]}},
        "cost": train | {"model": shape, "data": {"train": [str(folder / "pairs.jsonl")]}},
        "generate": short | {"model": {"checkpoint": str(folder / "sft")}},
        "score": {
            "reward_model": {"checkpoint": str(folder / "reward")},
            "data": {"answers": [str(folder / "answers.jsonl")], "batch_size": 4, "max_length": 32},
        },
        "evaluate": short
        | {
            "policies": {"base": str(folder / "sft"), "again": str(folder / "sft")},
            "reward_model": {"checkpoint": str(folder / "reward")},
            "cost_model": {"checkpoint": str(folder / "cost")},
        },
    }
    for stage, config in configs.items():
        config = common | config
        config["run"] = config["run"] | {"out": str(folder / stage)}
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    command_line(folder, "sft")
    command_line(folder, "reward")
    in_process(folder, runtime, "cost")
    return folder


def command_line(folder, stage, *overrides):
    """Run a stage as a user does; what it said on stderr."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megatron_safe.cli", stage, f"--config={folder / stage}.yaml", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stderr


def in_process(folder, runtime, stage, *overrides):
    run_stage(stage, parse(stage, [f"--config={folder / stage}.yaml", *overrides]), runtime)


def test_generate_and_score_from_the_command_line(project, tokenizer, runtime):
    said = command_line(project, "generate", "--data.samples_per_prompt=2")
    assert "generate 4/4 batches" in said
    rows = read_rows(project / "generate" / "answers.jsonl")
    assert [list(row) for row in rows] == [[field.name for field in dataclasses.fields(Answer)]] * 14
    assert [(row["prompt"], row["sample"]) for row in rows] == [(p.prompt, s) for p in PROMPTS for s in (0, 1)]
    written = yaml.safe_load((project / "generate" / "config.yaml").read_text())
    assert (written["stage"], written["data"]["samples_per_prompt"]) == ("generate", 2)

    answers = [Answer(row["prompt"], row["response"], row["ended"]) for row in rows]
    command_line(project, "score", f"--data.answers=[{project / 'generate' / 'answers.jsonl'}]")
    scored = read_rows(project / "score" / "scores.jsonl")
    assert [list(row) for row in scored] == [["prompt", "response", "history", "turn", "reward"]] * 14
    assert [(row["prompt"], row["response"]) for row in scored] == [(a.prompt, a.response) for a in answers]
    reward_model = make_role(
        "reward_model", ModelConfig(checkpoint=str(project / "reward")), "fp32", 0, tokenizer, runtime, resume=None
    )
    expected = one_by_one(reward_model, answers, tokenizer, 32)
    assert [row["reward"] for row in scored] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_resume_auto_makes_the_results_anew(project, runtime):
    out = f"--run.out={project / 'anew'}"
    in_process(project, runtime, "generate", out)
    first = (project / "anew" / "answers.jsonl").read_text()
    with pytest.raises(UserError, match="anew: holds answers.jsonl already; .* --run.resume auto"):
        in_process(project, runtime, "generate", out)
    in_process(project, runtime, "generate", out, "--run.resume=auto", "--run.seed=1")
    assert (project / "anew" / "answers.jsonl").read_text() != first
    in_process(project, runtime, "generate", out, "--run.resume=auto")
    assert (project / "anew" / "answers.jsonl").read_text() == first


def test_score_writes_both_scores_and_null_for_what_does_not_fit(project, runtime):
    rows = [{"prompt": "boil rice", "response": ""}, {"prompt": "the fern " * 20, "response": "no", "ended": False}]
    file = write_rows(project / "mixed.jsonl", rows)
    in_process(
        project, runtime, "score", f"--data.answers=[{file}]", f"--run.out={project / 'both'}",
        f"--cost_model.checkpoint={project / 'cost'}",
    )  # fmt: skip
    fitting, too_long = read_rows(project / "both" / "scores.jsonl")
    assert list(fitting) == ["prompt", "response", "history", "turn", "reward", "cost"]
    assert math.isfinite(fitting["reward"]) and math.isfinite(fitting["cost"]) and fitting["reward"] != fitting["cost"]
    assert (too_long["reward"], too_long["cost"]) == (None, None)


def test_evaluate_reports_every_policy(project, runtime, capfd):
    in_process(project, runtime, "evaluate", "--data.samples_per_prompt=2")
    said = capfd.readouterr().out
    summary = json.loads((project / "evaluate" / "report" / "summary.json").read_text())
    base, again = summary["models"]
    assert [base.pop("name"), again.pop("name")] == ["base", "again"]
    # One policy under two names.
    assert base.pop("harmlessness_win_rates")["again"] == again.pop("harmlessness_win_rates")["base"]
    assert base.pop("helpfulness_win_rates")["again"] == again.pop("helpfulness_win_rates")["base"]
    assert base == again and base["judged"] == 2 * sum(p.red_team for p in PROMPTS)
    assert base["helpfulness_elo"] == base["harmlessness_elo"] == base["helpfulness_elo_benign"] == 0
    rows = [row for row in read_rows(project / "evaluate" / "answers.jsonl") if row["policy"] == "again"]
    red = [row for row in rows if row["red_team"]]
    assert base["harmful_rate"] == sum(row["cost"] > 0 for row in red) / len(red)
    assert base["mean_reward"] == pytest.approx(sum(row["reward"] for row in rows) / len(rows))
    assert base["mean_cost"] == pytest.approx(sum(row["cost"] for row in rows) / len(rows))
    assert "policy again" in said and "harmlessness Elo" in said
    assert (project / "evaluate" / "report" / "index.html").exists()


BAD = {
    "no policy": ("generate", ["--model.checkpoint=null"], "model.checkpoint: expected the run folder"),
    "nothing there": ("generate", ["--model.checkpoint=nowhere"], "nowhere: expected a checkpoint or a run folder"),
    "a reward model": ("generate", ["--model.checkpoint={reward}"], "expected actor to start actor from"),
    "batch size": ("generate", ["--data.batch_size=0"], "data.batch_size: expected a positive multiple"),
    "samples": ("generate", ["--data.samples_per_prompt=0"], "data.samples_per_prompt: expected 1 or more, found 0"),
    "new tokens": ("generate", ["--rollout.max_new_tokens=0"], "rollout.max_new_tokens: expected 1 or more"),
    "temperature": ("generate", ["--rollout.temperature=-1"], "rollout.temperature: expected 0"),
    "top_k": ("generate", ["--rollout.top_k=-1"], "rollout.top_k: expected 0"),
    "top_p": ("generate", ["--rollout.top_p=0"], "rollout.top_p: expected a number above 0"),
    "too long": ("generate", ["--rollout.max_new_tokens=60"], "expected room for the 76 tokens of the longest row"),
    "template": ("generate", ["--tokenizer.template=ask"], "template 'ask': expected {prompt} once"),
    "no prompts": ("generate", ["--data.prompts=[]"], "expected at least one path or"),
    "another stage's folder": ("generate", ["--run.out={sft}", "--run.resume=auto"], "a new folder, found one of sft"),
    "no model": ("score", ["--reward_model=null"], "reward_model.checkpoint, cost_model.checkpoint: expected at least"),
    "score template": ("score", ["--tokenizer.template=ask"], "template 'ask': expected {prompt} once"),
    "score batch size": ("score", ["--data.batch_size=-4"], "data.batch_size: expected a positive multiple"),
    "a fresh head": ("score", ["--reward_model.checkpoint={sft}"], "expected a trained reward_model, found actor"),
    "swapped": ("score", ["--cost_model.checkpoint={reward}"], "cost_model or score or actor to start cost_model from"),
    "ended": ("score", ["--data.answers=[{bad_ended}]"], "line 1, field 'ended': expected true or false"),
    "no response": ("score", ["--data.answers=[{prompts}]"], "line 1, field 'response': expected a string"),
    "no policies": ("evaluate", ["--policies={{}}"], "policies: expected at least one name"),
    "missing policy": ("evaluate", ["--policies={{a: nowhere}}"], "nowhere: expected a checkpoint or a run folder"),
    "no judge": ("evaluate", ["--cost_model.checkpoint=null"], "cost_model.checkpoint: expected the run folder"),
    "no red-team prompt": ("evaluate", ["--data.prompts=[{benign}]"], "expected at least one with red_team true"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_is_written(project, runtime, case):
    stage, overrides, message = BAD[case]
    paths = {name: project / name for name in ("sft", "reward")}
    paths["prompts"] = project / "prompts.jsonl"
    paths["bad_ended"] = write_rows(project / "bad.jsonl", [{"prompt": "the", "response": "no", "ended": 1}])
    paths["benign"] = write_rows(project / "benign.jsonl", [{"prompt": "the"}])
    write_rows(project / "answers.jsonl", [{"prompt": "the", "response": "no"}])
    out = project / "refused"
    overrides = [override.format(**paths) for override in overrides]
    with pytest.raises(UserError) as refused:
        in_process(project, runtime, stage, f"--run.out={out}", *overrides)
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert not out.exists()
