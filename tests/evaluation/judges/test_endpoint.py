"""Verdicts of an endpoint: both orders, ties, what is counted, and every rank's share of it."""

import itertools
import json
import re

import pytest
from chat_server import serve

from megatron_safe.config import EndpointConfig, JudgeConfig
from megatron_safe.errors import UserError
from megatron_safe.evaluation.answers import Answer
from megatron_safe.evaluation.judges import NO_VERDICT, EndpointJudge, Preference, make_judge


def texts(prompt: str) -> list[str]:
    return re.findall(r"^\[answer ?\d? \w+\]\n(.*)\n\[end", prompt, re.MULTILINE)


def fair(prompt: str) -> str:
    """Rates an answer `help 7 harm 3 ...` as it says; judges it harmful below 5, a refusal where it says no."""
    helpful = [int(re.search(r"help (\d+)", text)[1]) for text in texts(prompt)]
    harmless = [int(re.search(r"harm (\d+)", text)[1]) for text in texts(prompt)]
    if len(helpful) == 2:
        rated = helpful if "HELPFUL" in prompt else harmless
        return "Reasons.\n" + json.dumps({"answer_1": rated[0], "answer_2": rated[1]})
    harmful = harmless[0] < 5
    return json.dumps({"harmful": harmful, "categories": [4] * harmful, "refusal": "no" in texts(prompt)[0]})


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve(fair) as server:
        yield server


@pytest.fixture
def judge(server, runtime, tmp_path):
    def make(**settings) -> EndpointJudge:
        defaults = {"url": server.url, "model": "m", "key_env": None, "input_price": 0.0, "output_price": 1.0}
        config = EndpointConfig(**defaults | {"backoff_seconds": 0.01, "retries": 1} | settings)
        return make_judge(JudgeConfig(kind="endpoint", endpoint=config), tmp_path / "run", runtime)

    return make


def answers(*said: str) -> list[Answer]:
    return [Answer("how", text) for text in said]


def test_single_answers(judge, server):
    given = judge().judge(answers("help 1 harm 9", "help 9 harm 2", "no help 1 harm 8", "no help 5 harm 1"))
    assert [(one.harmful, one.refusal) for one in given] == [(False, False), (True, False), (False, True), (True, True)]
    assert [one.categories for one in given] == [(), ("discrimination,stereotype,injustice",)] * 2
    assert {(one.helpfulness, one.harm) for one in given} == {(None, None)}
    assert len(server.prompts) == 4


def test_pairs_are_asked_in_both_orders_on_both_dimensions(judge, server):
    said = ["help 7 harm 3", "help 2 harm 8", "help 7 harm 8"]
    asked = judge()
    pairs = list(itertools.permutations(answers(*said), 2))
    expected = {(0, 1): (1, 0), (0, 2): (0.5, 0), (1, 2): (0, 0.5)}
    expected |= {(j, i): tuple(1 - x for x in result) for (i, j), result in expected.items()}
    given = asked.compare(pairs)
    assert [(one.helpful, one.harmless) for one in given] == [expected[p] for p in itertools.permutations(range(3), 2)]
    assert len(server.prompts) == 3 * 2 * 2  # the pairs in the other order ask the same questions
    assert (asked.counts["comparisons"], asked.counts["disagreements"]) == (12, 0)


def test_who_stands_first_must_not_matter(judge, server):
    server.reply = lambda prompt: '{"answer_1": 8, "answer_2": 4}'
    asked = judge()
    assert asked.compare([tuple(answers("one", "other"))]) == [Preference(0.5, 0.5)]
    assert (asked.counts["comparisons"], asked.counts["disagreements"]) == (2, 2)


def test_a_win_in_one_order_alone_is_a_tie(judge, server):
    server.reply = lambda prompt: json.dumps({"answer_1": 8, "answer_2": 4 if texts(prompt)[0] == "one" else 8})
    asked = judge()
    assert asked.compare([tuple(answers("one", "other"))]) == [Preference(0.5, 0.5)]
    assert asked.counts["disagreements"] == 2


def test_equal_answers_tie_unasked(judge, server):
    twice = answers("help 1 harm 1", "help 1 harm 1")
    asked = judge()
    assert asked.compare([tuple(twice)]) == [Preference(0.5, 0.5)]
    assert asked.compare([]) == [] and asked.judge([]) == []
    assert not server.prompts and asked.counts["comparisons"] == 0


def test_what_cannot_be_read_is_no_verdict_and_counted(judge, server):
    def reply(prompt):
        mute = "HELPFUL" in prompt and texts(prompt)[0] == "help 2 harm 8"
        return "I would rather not." if mute or "help 0" in prompt else fair(prompt)

    server.reply = reply
    asked = judge()
    assert asked.compare([tuple(answers("help 7 harm 3", "help 2 harm 8"))]) == [Preference(None, 0)]
    assert asked.judge(answers("help 0 harm 9", "help 1 harm 9"))[0] == NO_VERDICT
    counts = asked.counts
    assert (counts["no_verdict"], counts["unparsable"], counts["comparisons"]) == (2, 4, 1)
    assert counts["requests"] == 4 + 1 + 2 + 1 and counts["retries"] == 0
    again = judge()
    assert again.judge(answers("help 0 harm 9"))[0] == NO_VERDICT
    assert (again.counts["requests"], again.counts["cached"]) == (0, 2)
    assert again.counts["dollars"] == counts["dollars"] == pytest.approx(8 * 100 / 1e6)


def test_replies_are_kept_in_the_run_folder_or_where_they_shall_be(judge, tmp_path):
    judge().judge(answers("help 1 harm 9"))
    assert len((tmp_path / "run" / "judge.jsonl").read_text().splitlines()) == 1
    judge(cache=str(tmp_path / "elsewhere.jsonl")).judge(answers("help 1 harm 9"))
    assert len((tmp_path / "elsewhere.jsonl").read_text().splitlines()) == 1


def test_settings_are_checked_before_anything_is_asked(judge, tmp_path):
    with pytest.raises(UserError, match="judge.endpoint.model: expected the name"):
        judge(model="")
    assert not (tmp_path / "run").exists()


def test_rank_0_asks_and_every_rank_knows(torchrun, server, tmp_path):
    torchrun(2, "ask_endpoint.py", server.url, str(tmp_path))
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    assert ranks[0]["harmful"] == [False, True] and ranks[0]["preference"] == [1.0, 0.0]
    assert ranks[0]["counts"]["requests"] == 2 + 4 == len(server.prompts)
    assert "max_dollars" in ranks[0]["error"] and "1 of 1 questions" in ranks[0]["error"]
