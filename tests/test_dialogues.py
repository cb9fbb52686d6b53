"""Dialogues of several turns through every stage, against rows that are written and read by hand.

Legend: S tokens, V vocabulary.
"""

import json
import random

import pytest
import torch
from metrics_close import assert_metrics_close
from whole_rows import outputs

from megatron_safe.cli import parse, run_stage
from megatron_safe.config import ModelConfig, OptimizerConfig
from megatron_safe.data.datasets import ComparisonDataset, DemonstrationDataset
from megatron_safe.data.records import Comparison, Demonstration
from megatron_safe.data.tokenizer import load_tokenizer
from megatron_safe.models.roles import Role
from megatron_safe.training.preference import evaluate, measure, with_sign_accuracy
from megatron_safe.training.setup import make_role
from megatron_safe.training.sft import demonstration_gradient

LAYOUTS = {"one": (1, 1), "tp2": (2, 1), "pp2": (1, 2)}
TEMPLATE = "ask {prompt} answer"
WORDS = ["<pad>", "<s>", "</s>", "ask", "answer", *(f"w{i}" for i in range(38))]
BOS, EOS = 1, 2
STILL = OptimizerConfig(lr=0.0, clip_grad=0.0, schedule="constant")  # the gradient stays where it is, to be read
MODEL = ModelConfig(
    num_layers=1, hidden_size=32, ffn_hidden_size=40, num_attention_heads=4, num_query_groups=2,
    max_sequence_length=64, vocab_multiple=8, init_std=0.3,
)  # fmt: skip


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def before(history, prompt) -> list[int]:
    """What stands before the next answer, token by token."""
    turns = [[*ids(f"ask {user} answer {assistant}"), EOS] for user, assistant in history]
    return [BOS, *(token for turn in turns for token in turn), *ids(f"ask {prompt} answer")]


@pytest.fixture(scope="module")
def tokenizer(project):
    return load_tokenizer(project.data / "tokenizer", TEMPLATE)


def make_dialogues(count: int, seed: int) -> list[tuple]:
    """(history of 0 to 3 exchanges, prompt, two responses)"""
    draw = random.Random(seed)

    def text(least: int = 1, most: int = 3) -> str:
        return " ".join(draw.choices(WORDS[5:], k=draw.randint(least, most)))

    histories = [tuple((text(), text(0)) for _ in range(at % 4)) for at in range(count)]
    return [(history, text(), text(1, 6), text(0, 6)) for history in histories]


# SFT.


@pytest.mark.parametrize("turns", ["last", "all"])
def test_loss_and_gradient_are_those_of_the_turns_asked_for(runtime, tokenizer, turns):
    history = (("w1 w2", "w3 w4 w5"), ("w6", ""), ("w7 w8 w9", "w10"))
    dialogues = [(history, "w11", "w12 w13", ""), ((), "w1", "w2", ""), *make_dialogues(6, 3)]
    records = [Demonstration(prompt, response, history) for history, prompt, response, _ in dialogues]
    actor = Role("actor", MODEL, runtime, len(WORDS), "fp32", 4, STILL, 10)
    data = DemonstrationDataset(records, tokenizer, TEMPLATE, 64, turns)
    actor.zero_grad()
    found = demonstration_gradient(actor, data.batch(range(len(data))), max_tokens=40, weight=0.7)

    losses = []
    for history, prompt, response, _ in dialogues:
        row = [*before(history, prompt), *ids(response), EOS]
        logits_SV = outputs(actor.module, torch.tensor([row]))[0].double()[:, : len(WORDS)]
        learnt = set(range(len(before(history, prompt)), len(row)))
        for turn, (user, assistant) in enumerate(history if turns == "all" else ()):
            begin = len(before(history[:turn], user))
            learnt |= set(range(begin, begin + len(ids(assistant)) + 1))
        for at in sorted(learnt):
            losses.append(torch.logsumexp(logits_SV[at - 1], 0) - logits_SV[at - 1, row[at]])
    assert found["tokens"] == len(losses)
    mean = torch.stack(losses).mean()
    assert found["loss"] == pytest.approx(float(mean.detach()), rel=1e-5)
    names, parameters = zip(*actor.module.named_parameters(), strict=True)
    for name, wanted in zip(names, torch.autograd.grad(0.7 * mean, parameters), strict=True):
        gradient = dict(actor.module.named_parameters())[name].main_grad
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))


# Labels that nobody asked.


def test_sign_accuracy_is_of_the_answers_that_have_a_sign():
    scores_2P, signs_2P = torch.tensor([3.0, -1.0, 2.0, 0.5, -4.0, 1.0]), torch.tensor([-1.0, 0, 0, 1, 1, 0])
    found = with_sign_accuracy({n: float(v) for n, v in measure("cost", scores_2P, signs_2P, 3).items()})
    assert found == pytest.approx({"accuracy": 2 / 3, "score": 1.5 / 6, "sign_accuracy": 2 / 3})
    nothing = measure("cost", scores_2P, torch.zeros(6), 3)
    assert set(with_sign_accuracy({n: float(v) for n, v in nothing.items()})) == {"accuracy", "score"}


def test_held_out_accuracies_are_of_what_was_asked(runtime, tokenizer):
    labels = [(True, None), (None, None), (False, True), (None, False), (True, True)]
    pairs = zip(make_dialogues(5, 8), labels, strict=True)
    records = [Comparison(p, *answers, None, 1, *safe, history=h) for (h, p, *answers), safe in pairs]
    model = Role("cost_model", MODEL, runtime, len(WORDS), "fp32", 5)
    data = ComparisonDataset(records, tokenizer, TEMPLATE, 64, "cost")
    found = evaluate("cost", model, data, 2, 60)

    right, safe, unsafe, ranked, total = [], [], [], 0, 0.0
    for record in records:
        costs = []
        for response, is_safe in zip(record.responses, record.is_safe, strict=True):
            row = [*before(record.history, record.prompt), *ids(response), EOS]
            costs.append(float(outputs(model.module, torch.tensor([row]))[0, -1]))
            if is_safe is not None:
                right.append((costs[-1] < 0) == is_safe)
                (safe if is_safe else unsafe).append(costs[-1])
        ranked += costs[0] > costs[1]
        total += sum(costs)
    wanted = {
        "accuracy": ranked / 5, "score": total / 10, "sign_accuracy": sum(right) / len(right),
        "safe_score": sum(safe) / len(safe), "unsafe_score": sum(unsafe) / len(unsafe),
    }  # fmt: skip
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-5) and len(right) == 6


# All stages, in every layout.


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dialogues")
    rows = {"demonstrations": [], "comparisons": [], "prompts": [], "answers": []}
    draw = random.Random(1)
    for at, (history, prompt, *responses) in enumerate(make_dialogues(24, 0)):
        labels = {"better_response_id": draw.randint(0, 1), "safer_response_id": draw.randint(0, 1)}
        labels |= {f"is_response_{side}_safe": draw.random() < 0.5 for side in (0, 1)}
        row = {"prompt": prompt, "history": history}
        rows["demonstrations"].append(row | {"response": responses[0]})
        rows["comparisons"].append(row | dict(zip(("response_0", "response_1"), responses, strict=True)) | labels)
        rows["prompts"].append(row | {"red_team": at % 3 == 0})
        rows["answers"].append(row | {"response": responses[1]})
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return folder


@pytest.fixture(scope="module")
def finished(project, files, runtime, torchrun, tmp_path_factory):
    """layout -> the folder with a run of every stage on dialogues, in that layout."""
    folders = {}

    def run(layout: str):
        if layout not in folders:
            folder = folders[layout] = tmp_path_factory.mktemp(layout)
            pairs = [f"--data.train=[{files}/comparisons.jsonl]", "--data.eval=[]", "--training.steps=1"]
            demonstrations = f"[{files}/demonstrations.jsonl]"
            prompts = f"--data.prompts=[{files}/prompts.jsonl]"
            own = {
                "sft": [f"--data.train={demonstrations}", "--training.loss_turns=all", "--training.steps=2"],
                "reward": pairs,
                "cost": pairs,
                "ppo-lag": [prompts, f"--data.ptx={demonstrations}", "--ppo.steps=1"],
                "generate": [prompts, "--rollout.temperature=0"],
            }
            runs = [
                (stage, project.arguments(stage, folder / stage, layout, *more, models=folder))
                for stage, more in own.items()
            ]
            models = [f"--{name}_model.checkpoint={folder}/{name}" for name in ("reward", "cost")]
            runs.append(("score", [
                *runs[-1][1][1:5], f"--run.out={folder}/score", f"--data.answers=[{files}/answers.jsonl]", *models,
                "--data.turns=all", "--data.max_length=24", "--data.batch_size=8",
            ]))  # fmt: skip
            if layout == "one":
                for stage, arguments in runs:
                    run_stage(stage, parse(stage, arguments), runtime)
            else:
                (tp, pp), plan = LAYOUTS[layout], folder / "plan.json"
                plan.write_text(json.dumps({"tp": tp, "pp": pp, "seed": 0, "runs": runs}))
                torchrun(tp * pp, "run_stages.py", str(plan))
                assert json.loads(plan.with_suffix(".out.json").read_text()) == [""] * len(runs)
        return folders[layout]

    return run


def read(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_every_layout_does_as_one_process(finished, metrics_of, layout):
    for stage in ("sft", "reward", "cost", "ppo-lag"):
        found = metrics_of(finished(layout) / stage)
        assert_metrics_close(found, metrics_of(finished("one") / stage))
    assert (finished(layout) / "generate" / "answers.jsonl").read_text() == (
        finished("one") / "generate" / "answers.jsonl"
    ).read_text()
    scores = (read(finished(name) / "score" / "scores.jsonl") for name in (layout, "one"))
    for found, wanted in zip(*scores, strict=True):
        assert found.pop("reward") == pytest.approx(wanted.pop("reward"), abs=1e-4)
        assert found.pop("cost") == pytest.approx(wanted.pop("cost"), abs=1e-4)
        assert found == wanted


def load(runtime, tokenizer, folder, name, run):
    return make_role(name, ModelConfig(checkpoint=str(folder / run)), "fp32", 0, tokenizer, runtime, resume=None).module


def test_answers_follow_as_much_of_the_dialogue_as_fits(finished, files, runtime, tokenizer):
    actor, lost = load(runtime, tokenizer, finished("one"), "actor", "ppo-lag"), 0
    answers = iter(read(finished("one") / "generate" / "answers.jsonl"))
    for prompt in read(files / "prompts.jsonl"):
        history = prompt["history"]
        while len(before(history, prompt["prompt"])) > 12:  # rollout.max_prompt_length
            history = history[1:]
        lost += history != prompt["history"]
        for sample in range(2):
            answer = next(answers)
            assert (answer["prompt"], answer["history"]) == (prompt["prompt"], history)
            assert (answer["red_team"], answer["sample"]) == (prompt["red_team"], sample)
        asked, said = before(history, prompt["prompt"]), []
        while len(said) < 10 and EOS not in said:  # rollout.max_new_tokens
            with torch.no_grad():
                said.append(int(outputs(actor, torch.tensor([asked + said]))[0, -1, : len(WORDS)].argmax()))
        assert answer["ended"] == (said[-1] == EOS)
        assert answer["response"] == " ".join(WORDS[i] for i in said if i > EOS)
    assert next(answers, None) is None and 0 < lost < 24


def test_scores_of_all_turns_are_those_of_each_as_an_end(finished, files, runtime, tokenizer):
    cost_model = load(runtime, tokenizer, finished("one"), "cost_model", "cost")
    scored = iter(read(finished("one") / "score" / "scores.jsonl"))
    lost = 0
    for answer in read(files / "answers.jsonl"):
        exchanges = [*answer["history"], [answer["prompt"], answer["response"]]]
        for turn, (prompt, response) in enumerate(exchanges):
            row = next(scored)
            assert [row[name] for name in ("prompt", "response", "history", "turn")] == [
                prompt, response, exchanges[:turn], turn,
            ]  # fmt: skip
            tokens, history = [0] * 99, exchanges[:turn]
            while len(tokens) > 24:  # data.max_length
                tokens = [*before(history, prompt), *ids(response), EOS]
                lost, history = lost + (history != exchanges[:turn]), history[1:]
            with torch.no_grad():
                cost = float(outputs(cost_model, torch.tensor([tokens]))[0, -1])
            assert row["cost"] == pytest.approx(cost, rel=1e-4, abs=1e-5)
    assert next(scored, None) is None and lost


def test_the_runs_are_worth_comparing(finished, metrics_of):
    folder = finished("one")
    (step,) = metrics_of(folder / "ppo-lag")
    assert step["actor_grad_norm"] > 0.1 and step["ptx_loss"] > 0 and 0 < step["ended"] < 1
    assert {row["turn"] for row in read(folder / "score" / "scores.jsonl")} == {0, 1, 2, 3}


def test_all_turns_learn_what_the_last_does_not(project, files, runtime, metrics_of, tmp_path):
    tokens = {}
    for turns in ("last", "all"):
        more = [f"--data.train=[{files}/demonstrations.jsonl]", f"--training.loss_turns={turns}", "--training.steps=1"]
        run_stage("sft", parse("sft", project.arguments("sft", tmp_path / turns, "one", *more)), runtime)
        tokens[turns] = metrics_of(tmp_path / turns)[0]["tokens"]
    assert tokens["last"] < tokens["all"]
