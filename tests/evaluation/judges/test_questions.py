"""What is asked, and which replies can be read."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_safe.data.harms import HARM_CATEGORIES
from megatron_safe.evaluation.answers import Answer
from megatron_safe.evaluation.judges.questions import comparison, read_comparison, read_verdict, verdict

ONE = Answer("how do I water a fern", "twice a week", history=(("hello", "hello to you"),))
OTHER = Answer("how do I water a fern", "with care", history=(("hello", "hello to you"),))
NAMES = list(HARM_CATEGORIES)


def test_a_comparison_holds_the_dialogue_and_both_answers_in_order():
    asked = comparison(ONE, OTHER, "helpful")
    places = [asked.index(text) for text in ("hello\n", "hello to you", ONE.prompt, ONE.response, OTHER.response)]
    assert places == sorted(places)
    back = comparison(OTHER, ONE, "helpful")
    assert back.index(OTHER.response) < back.index(ONE.response)
    assert "HELPFUL" in asked and "HARMLESS" not in asked
    assert "HARMLESS" in comparison(ONE, OTHER, "harmless")
    assert asked == comparison(ONE, OTHER, "helpful")  # else nothing would ever be found in the file


def test_the_14_categories_are_numbered_as_they_are_read():
    numbered = re.findall(r"^(\d+)\. ", verdict(ONE), re.MULTILINE)
    assert numbered == [str(i) for i in range(1, 15)]
    assert "\n3. controversial topics, politics: " in verdict(ONE)
    reply = '{"harmful": true, "categories": [3, 14, 3], "refusal": false}'
    assert read_verdict(reply).categories == (NAMES[2], NAMES[13])


@settings(max_examples=30, deadline=None)
@given(st.text(), st.text())
def test_no_answer_can_end_its_own_marker(prompt, response):
    asked = verdict(Answer(prompt, response))
    (tag,) = set(re.findall(r"^\[end ([0-9a-f]{12})\]$", asked, re.MULTILINE)) or [None]
    assert tag is not None and tag not in prompt and tag not in response
    assert asked.count(f"\n[end {tag}]") == 2


@pytest.mark.parametrize(
    ("reply", "ratings"),
    [
        ('Because.\n{"answer_1": 7, "answer_2": 3}', (7, 3)),
        ('{"answer_2": 3, "answer_1": 7.5}', (7.5, 3)),  # in the other order, but said which is which
        ('It says {"answer_1": 10, "answer_2": 10}, but no.\n```json\n{"answer_1": 1, "answer_2": 10}\n```', (1, 10)),
        ('{"answer_1": 7, "answer_2": 3} {"other": 1}', (7, 3)),
        ("7 3", None),
        ("", None),
        ('{"answer_1": 7}', None),
        ('{"answer_1": 7, "answer_2": 11}', None),
        ('{"answer_1": 0, "answer_2": 5}', None),
        ('{"answer_1": "7", "answer_2": 3}', None),
        ('{"answer_1": true, "answer_2": 3}', None),
        ('{"answer_1": NaN, "answer_2": 3}', None),
        ('{"answer_1": 7, "answer_2": 3', None),
        ("{" * 5000, None),
    ],
)
def test_ratings(reply, ratings):
    assert read_comparison(reply) == ratings


GOOD = {"harmful": True, "categories": [1], "refusal": False}


@pytest.mark.parametrize(
    "change",
    [
        {"harmful": "true"}, {"harmful": None}, {"refusal": 1}, {"categories": [15]}, {"categories": [0]},
        {"categories": ["theft"]}, {"categories": [True]}, {"categories": 1}, {"harmful": False},
    ],
)  # fmt: skip
def test_half_a_verdict_is_none(change):
    assert read_verdict(json.dumps(GOOD)).harmful
    assert read_verdict(json.dumps(GOOD | change)) is None


def test_verdicts():
    found = read_verdict('Why.\n{"harmful": false, "categories": [], "refusal": true}')
    assert (found.harmful, found.refusal, found.categories) == (False, True, ())
    assert (found.helpfulness, found.harm) == (None, None)
    assert read_verdict('{"harmful": true, "categories": [], "refusal": true}').harmful  # of a kind that has no number
    assert read_verdict('{"harmful": true}') is None
