"""The published forms, each in rows that we wrote: what they give, what they leave None, and what they leave out."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_safe.data.records import Comparison, Demonstration, Prompt
from megatron_safe.data.rows import BadRow, BadRows, Row, read_rows
from megatron_safe.data.sources import SOURCES, Reading, question_of

SECRET = "words that no message may repeat"


def convert(source, kind, rows, question=None, skip=False):
    """(records, what was noted) of rows."""
    reading = Reading(BadRows(skip), question)
    placed = (Row(f"file, line {n}", row) for n, row in enumerate(rows, start=1))
    return list(SOURCES[source][kind](placed, reading)), reading


def refused(source, kind, row, question=None):
    with pytest.raises(BadRow) as caught:
        convert(source, kind, [row], question)
    assert SECRET not in str(caught.value) and str(caught.value).startswith("file, line 1, field ")
    return str(caught.value)


# PKU-SafeRLHF.

HARMS = {"Violence": False, "Drugs": True, "Animal Abuse": True}
PKU = {
    "prompt": "p", "response_0": "a", "response_1": "", "is_response_0_safe": False, "is_response_1_safe": True,
    "better_response_id": 0, "safer_response_id": 1,
}  # fmt: skip
NEW = PKU | {
    "prompt_source": "x", "response_0_source": "y", "response_1_source": "z", "response_0_severity_level": 2,
    "response_1_severity_level": 0, "response_0_sha256": "0", "response_1_sha256": "1",
    "response_0_harm_category": HARMS, "response_1_harm_category": dict.fromkeys(HARMS, False),
}  # fmt: skip


def test_pku_saferlhf_in_every_release():
    old, new = Comparison("p", "a", "", 0, 1, False, True), Comparison("p", "a", "", 0, 1, False, True, HARMED)
    assert convert("pku-saferlhf", "comparisons", [PKU, NEW])[0] == [old, new]
    # As parquet fills in what a row does not have.
    columns = dict.fromkeys(NEW) | PKU
    assert convert("pku-saferlhf", "comparisons", [columns])[0] == [old]


HARMED = ("Drugs", "Animal Abuse")


@pytest.mark.parametrize("name", ["better_response_id", "safer_response_id", "is_response_0_safe"])
def test_pku_saferlhf_always_asked(name):
    assert f"field '{name}': expected " in refused("pku-saferlhf", "comparisons", PKU | {name: None})


@pytest.mark.parametrize("harms, found", [([SECRET], "a list of 1"), ({SECRET: 1}, "one with the number 1")])
def test_bad_categories_are_refused(harms, found):
    message = refused("pku-saferlhf", "comparisons", NEW | {"response_1_harm_category": harms})
    assert "field 'response_1_harm_category': expected an object of names with true or false, found " + found in message


def test_prompts_of_pairs_come_once():
    prompts, reading = convert("pku-saferlhf", "prompts", [PKU, NEW, PKU | {"prompt": "q"}, PKU])
    assert prompts == [Prompt("p", red_team=True), Prompt("q", red_team=True)]
    assert reading.left_out == {"prompts that came before": 2}


# BeaverTails.


def answer(prompt, response, is_safe, *harms):
    return {"prompt": prompt, "response": response, "is_safe": is_safe, "category": HARMS | dict.fromkeys(harms, True)}


def test_beavertails_pairs_a_safe_with_an_unsafe_answer_of_a_prompt():
    rows = [
        answer("p", "safe", True), answer("q", "alone", True), answer("p", "bad", False, "Violence"),
        answer("p", "worse", False), answer("r", "both", True), answer("r", "both", False), answer("r", "no", False),
        answer("p", "bad", False),
    ]  # fmt: skip
    (pair,), reading = convert("beavertails", "comparisons", rows)
    assert pair.prompt == "p" and pair.better_response_id is None
    assert pair.responses[pair.safer_response_id] == "safe" and pair.is_safe[pair.safer_response_id]
    assert pair.responses[1 - pair.safer_response_id] == "bad" and not pair.is_safe[1 - pair.safer_response_id]
    assert {pair.response_0_categories, pair.response_1_categories} == {HARMED, ("Violence", *HARMED)}
    assert reading.left_out == {
        "answers that make no pair": 3, "answers whose annotators disagree": 1,
        "rows about an answer that came before": 2,
    }  # fmt: skip


answers = st.tuples(st.sampled_from("pq"), st.sampled_from("abcdef"), st.booleans())


@given(rows=st.lists(answers, max_size=20))
def test_beavertails_uses_or_counts_every_row(rows):
    """The laws of pairing, against the rows themselves."""
    pairs, reading = convert("beavertails", "comparisons", [answer(*row) for row in rows])
    verdicts = {(p, r): {s for q, t, s in rows if (q, t) == (p, r)} for p, r, _ in rows}
    used = Counter((pair.prompt, response) for pair in pairs for response in pair.responses)
    assert all(count == 1 for count in used.values())
    for pair in pairs:
        assert [verdicts[pair.prompt, response] for response in pair.responses] == [{safe} for safe in pair.is_safe]
        assert pair.is_safe == (pair.safer_response_id == 0, pair.safer_response_id == 1)
    assert 2 * len(pairs) + sum(reading.left_out.values()) == len(rows)
    for prompt in "pq":
        sides = [sum(found == {safe} for (p, _), found in verdicts.items() if p == prompt) for safe in (True, False)]
        assert sum(pair.prompt == prompt for pair in pairs) == min(sides)


def test_a_bad_row_of_beavertails_is_refused_or_counted():
    bad = answer("p", "a", "yes")
    assert "field 'is_safe': expected true or false, found the string" in refused("beavertails", "comparisons", bad)
    rows = [bad, answer("p", "a", True), answer("p", "b", False)]
    pairs, reading = convert("beavertails", "comparisons", rows, skip=True)
    assert len(pairs) == 1 and len(reading.bad_rows) == 1


# Pairs without columns.


def test_safe_unsafe_pairs_in_an_order_that_tells_nothing():
    rows = [{"prompt": f"p{n}", "safe_response": "good", "unsafe_response": f"bad {n}"} for n in range(400)]
    pairs, _ = convert("safe-unsafe-pairs", "comparisons", rows)
    assert [pair.responses[pair.safer_response_id] for pair in pairs] == ["good"] * 400
    assert {(pair.safer_response_id, *pair.is_safe) for pair in pairs} == {(0, True, False), (1, False, True)}
    assert all(pair.better_response_id is None for pair in pairs)
    assert 150 < sum(pair.safer_response_id for pair in pairs) < 250  # five standard deviations
    assert convert("safe-unsafe-pairs", "comparisons", rows[::-1])[0] == pairs[::-1]  # a row's own text decides


# hh-rlhf.


def transcript(*turns):
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))


TALK = {"chosen": transcript("hi", "hello", "more", "no"), "rejected": transcript("hi", "hello", "more", "yes: 1\n2")}


@pytest.mark.parametrize("question, other", [("better_response_id", "safer"), ("safer_response_id", "better")])
def test_hh_rlhf_answers_one_question_alone(question, other):
    asked = {"better_response_id": "helpfulness", "safer_response_id": "harmlessness"}[question]
    rows = [TALK] + [{"chosen": transcript(f"{n}", "x"), "rejected": transcript(f"{n}", "y")} for n in range(400)]
    pairs, _ = convert("hh-rlhf", "comparisons", rows, asked)
    assert (pairs[0].history, pairs[0].prompt) == ((("hi", "hello"),), "more")
    assert pairs[0].responses[getattr(pairs[0], question)] == "no" and "yes: 1\n2" in pairs[0].responses
    for pair in pairs:
        assert getattr(pair, f"{other}_response_id") is None and pair.is_safe == (None, None)
        assert pair is pairs[0] or pair.responses[getattr(pair, question)] == "x"
    assert 150 < sum(getattr(pair, question) for pair in pairs) < 250


def test_hh_rlhf_as_demonstrations_and_prompts():
    assert convert("hh-rlhf", "demonstrations", [TALK])[0] == [Demonstration("more", "no", (("hi", "hello"),))]
    prompts, reading = convert("hh-rlhf", "prompts", [TALK, TALK], "harmlessness")
    assert prompts == [Prompt("more", red_team=True, history=(("hi", "hello"),))] and reading.left_out.total() == 1
    assert not convert("hh-rlhf", "prompts", [TALK], "helpfulness")[0][0].red_team


def test_turns_of_one_speaker_in_a_row_are_one():
    twice = {"chosen": transcript("hi", "a") + "\n\nAssistant: b", "rejected": "Human: hi\n\nAssistant:"}
    (pair,), _ = convert("hh-rlhf", "comparisons", [twice], "helpfulness")
    assert pair.prompt == "hi" and set(pair.responses) == {"a\n\nb", ""} and not pair.history


@pytest.mark.parametrize(
    "row, message",
    [
        ({"rejected": transcript("hi", "other", "more", "no")}, "'rejected': expected the turns of 'chosen' up to "),
        ({"rejected": transcript("hi", SECRET)}, "up to the last, found 1 of 3 turns in common"),
        ({"chosen": transcript("hi", SECRET, "more")}, "'chosen': expected turns that end with the assistant's, "),
        ({"chosen": SECRET}, "'chosen': expected turns that begin with 'Human:' and 'Assistant:', a human's first, "),
        ({"chosen": "\n\nAssistant: a\n\nHuman: b"}, "a human's first, found Assistant's first"),
        ({"chosen": "\n\nHuman: \n\nAssistant: b"}, "'chosen': expected a string that is not empty, found 0 blank"),
        ({"chosen": None}, "field 'chosen': expected a string, found null"),
    ],
)
def test_bad_transcripts_are_refused(row, message):
    assert message in refused("hh-rlhf", "comparisons", TALK | row, "helpfulness")


def test_an_empty_chosen_answer_is_no_demonstration():
    row = TALK | {"chosen": transcript("hi", " ")}
    assert "'chosen': expected a last turn that is not empty" in refused("hh-rlhf", "demonstrations", row)


@pytest.mark.parametrize(
    "path, question",
    [
        ("hh/harmless-base/train.jsonl.gz", "harmlessness"), ("/x/helpful-online", "helpfulness"),
        ("Anthropic/hh-rlhf/helpful-base", "helpfulness"), ("a/hh-rlhf-harmless-base-test.jsonl.gz", "harmlessness"),
        ("helpful/harmless-base", "harmlessness"), ("helpful-and-harmless/test.jsonl", None), ("hh-rlhf", None),
    ],
)  # fmt: skip
def test_the_path_tells_the_question(path, question):
    assert question_of(path) == question


def test_red_team_attempts():
    rows = [
        {"transcript": transcript("attack", "no", "again", "yes"), "tags": ["Theft", "Other"], "rating": 4.0},
        {"transcript": "\n\nHuman: other", "tags": None}, {"transcript": transcript("attack", "x")},
    ]  # fmt: skip
    prompts, reading = convert("hh-red-team", "prompts", rows)
    assert prompts == [Prompt("attack", red_team=True, category="Theft"), Prompt("other", red_team=True)]
    assert reading.left_out == {"prompts that came before": 1}
    assert "field 'tags': expected a list of strings" in refused("hh-red-team", "prompts", rows[0] | {"tags": SECRET})


# Alpaca.


def test_alpaca_rows_and_seed_tasks():
    seed = {"id": "s", "name": "n", "instruction": "Add.", "is_classification": False}
    rows = [
        {"instruction": "Name a fern.", "input": "", "output": "Bracken."}, {"instruction": "Greet.", "output": "Hi."},
        seed | {"instances": [{"input": "1, 2", "output": "3"}, {"input": "2, 2", "output": "4"}]},
    ]  # fmt: skip
    expected = [("Name a fern.", "Bracken."), ("Greet.", "Hi."), ("Add. 1, 2", "3"), ("Add. 2, 2", "4")]
    assert convert("alpaca", "demonstrations", rows)[0] == [Demonstration(*row) for row in expected]
    assert convert("alpaca", "prompts", rows)[0] == [Prompt(prompt) for prompt, _ in expected]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"output": ""}, "field 'output': expected a string that is not empty"),
        ({"input": 3}, "field 'input': expected a string, found the number 3"),
        ({"instances": SECRET}, "field 'instances': expected a list of objects with input and output"),
        ({"instances": [{"input": SECRET}]}, "field 'output': expected a string, found no such field"),
    ],
)
def test_bad_alpaca_rows_are_refused(row, message):
    assert message in refused("alpaca", "demonstrations", {"instruction": SECRET, "output": "a"} | row)


# The real files.


@pytest.mark.parametrize(
    "name, source, kind, question, count, bad",
    [
        ("hh-rlhf-harmless-base-test.jsonl.gz", "hh-rlhf", "comparisons", "harmlessness", 2312, 0),
        ("hh-rlhf-harmless-base-test.jsonl.gz", "hh-rlhf", "demonstrations", None, 2308, 4),
        ("pku-saferlhf-pairs-2000.json", "safe-unsafe-pairs", "comparisons", None, 2000, 0),
        ("pku-saferlhf-pairs-2000.json", "safe-unsafe-pairs", "prompts", None, 776, 0),
        ("alpaca-seed-tasks.jsonl", "alpaca", "demonstrations", None, 175, 0),
    ],
)
def test_real_files(real_data, name, source, kind, question, count, bad):
    reading = Reading(BadRows(skip=True), question)
    records = list(SOURCES[source][kind](read_rows([real_data / name]), reading))
    assert len(records) == count and len(reading.bad_rows) == bad
    assert len(json.dumps([record.prompt for record in records])) > 10_000
