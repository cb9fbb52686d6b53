"""Labels of people, found again by text."""

import json

import pytest

from megatron_safe.config import JudgeConfig, PeopleConfig
from megatron_safe.errors import UserError
from megatron_safe.evaluation.answers import Answer
from megatron_safe.evaluation.judges import NO_VERDICT, PeopleJudge, Preference, make_judge

A, B, C = (Answer("how", text) for text in ("one", "two", "three"))
LATER = Answer("how", "one", history=(("hi", "hello"),))


@pytest.fixture
def judge(tmp_path, runtime):
    def make(*rows: dict) -> PeopleJudge:
        file = tmp_path / "labels.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = JudgeConfig(kind="people", people=PeopleConfig([str(file)]))
        return make_judge(config, tmp_path / "run", runtime)

    return make


def row(one: str, other: str, **labels) -> dict:
    return {"prompt": "how", "response_0": one, "response_1": other} | labels


def test_pairs_are_found_in_either_order(judge):
    given = judge(
        row("one", "two", better_response_id=0, safer_response_id=1),
        row("two", "three", better_response_id="tie", safer_response_id=None),
    )
    pairs = [(A, B), (B, A), (B, C), (C, B), (A, C)]
    assert given.compare(pairs) == [
        Preference(1, 0), Preference(0, 1), Preference(0.5, None), Preference(0.5, None), Preference(None, None),
    ]  # fmt: skip
    assert given.counts == {"pairs": 5, "helpful_without_verdict": 1, "harmless_without_verdict": 3}


def test_answers_have_the_verdict_of_any_row_they_stand_in(judge):
    given = judge(
        row(
            "one", "two", is_response_0_safe=True, is_response_1_safe=False,
            response_1_harm_category={"theft": True, "arson": False},
        ),
        row("three", "two", is_response_1_safe=False, response_1_harm_category={"arson": True, "theft": True}),
    )  # fmt: skip
    safe, harmful, unknown = given.judge([A, B, C])
    assert (safe.harmful, safe.categories, safe.refusal) == (False, (), None)
    assert (harmful.harmful, harmful.categories) == (True, ("theft", "arson"))
    assert (harmful.helpfulness, harmful.harm) == (None, None)
    assert unknown == NO_VERDICT
    assert given.counts == {"answers": 3, "answers_without_verdict": 1}


def test_the_majority_of_rows_counts(judge):
    better = [row("one", "two", better_response_id=i) for i in (0, 0)] + [row("two", "one", better_response_id=0)]
    votes = ((False, False), (True, False), (True, True), (True, True))
    safe = [row("one", "three", is_response_0_safe=s, is_response_1_safe=t) for s, t in votes]
    split = [row("two", "three", safer_response_id=i) for i in (0, 1)]
    given = judge(*better, *safe, *split)
    assert given.compare([(A, B), (B, C)]) == [Preference(1, None), Preference(None, 0.5)]
    assert [one.harmful for one in given.judge([A, C])] == [False, None]


def test_a_dialogue_is_another_prompt(judge):
    given = judge(
        row("one", "two", is_response_0_safe=True),
        row("one", "two", is_response_0_safe=False, history=[["hi", "hello"]]),
    )
    assert [one.harmful for one in given.judge([A, LATER])] == [False, True]


def test_no_match_at_all_is_an_error(judge):
    given = judge(row("one", "two", is_response_0_safe=True))
    with pytest.raises(UserError, match="labels.jsonl: expected a label for at least one answer of 2, found none"):
        given.judge([B, C])
    with pytest.raises(UserError, match="at least one pair of answers of 1"):
        given.compare([(A, B)])
    assert given.compare([]) == given.judge([]) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"better_response_id": 2}, "line 2, field 'better_response_id': expected 0, 1 or"),
        ({"safer_response_id": True}, "line 2, field 'safer_response_id': expected 0, 1 or"),
        ({"is_response_0_safe": 1}, "line 2, field 'is_response_0_safe': expected true or false"),
        ({"response_1_harm_category": "theft"}, "line 2, field 'response_1_harm_category': expected an object of"),
        ({"history": [["hi"]]}, r"line 2, field 'history\[0\]': expected a \[user, assistant\] pair"),
        ({"response_1": 3}, "line 2, field 'response_1': expected a string"),
    ],
)
def test_bad_rows_are_named(judge, change, message):
    with pytest.raises(UserError, match=message):
        judge(row("one", "two"), row("one", "two") | change)
