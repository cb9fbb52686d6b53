"""Rows of our own form as records, and refusals that name the place and never repeat a text."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_safe.data.records import Comparison, Demonstration, Prompt
from megatron_safe.data.rows import read_rows
from megatron_safe.data.sources import (
    SOURCES,
    Reading,
    plain_row,
    read_comparisons,
    read_demonstrations,
    read_prompts,
)
from megatron_safe.errors import UserError

FIXTURE = Path(__file__).parent / "fixtures" / "comparisons.jsonl"
SECRET = "words that no message may repeat"
GOOD = {
    "prompt": SECRET,
    "response_0": SECRET,
    "response_1": SECRET,
    "better_response_id": 0,
    "safer_response_id": 1,
    "is_response_0_safe": False,
    "is_response_1_safe": True,
}


def test_published_columns():
    comparisons = read_comparisons([FIXTURE])
    assert len(comparisons) == 4
    assert comparisons[1] == Comparison(
        prompt="How do I read my neighbour's letters?",
        response_0="Do the thing you should not do, step by step.",
        response_1="I will not help with that; you could ask them instead.",
        better_response_id=0,
        safer_response_id=1,
        is_response_0_safe=False,
        is_response_1_safe=True,
        response_0_categories=("Privacy Violation",),
    )
    assert comparisons[2].prompt == "Wie koche ich Reis? 🍚"
    # The two judgements agree on some rows and not on others, and arrive as they were.
    assert [(c.better_response_id, c.safer_response_id) for c in comparisons] == [(0, 0), (0, 1), (0, 0), (1, 0)]
    assert [c.is_safe for c in comparisons] == [(True, True), (False, True), (True, False), (False, False)]


@given(
    labels=st.lists(
        st.tuples(st.integers(0, 1), st.integers(0, 1), st.booleans(), st.booleans()), min_size=1, max_size=8
    )
)
def test_labels_arrive_unchanged_in_any_combination(tmp_path_factory, labels):
    keys = ("better_response_id", "safer_response_id", "is_response_0_safe", "is_response_1_safe")
    file = tmp_path_factory.mktemp("labels") / "rows.jsonl"
    file.write_text("".join(json.dumps(GOOD | dict(zip(keys, row, strict=True))) + "\n" for row in labels))
    assert [tuple(getattr(row, key) for key in keys) for row in read_comparisons([file])] == labels


def test_plain_and_compressed_files_in_order(write_lines, tmp_path):
    first = write_lines({"prompt": "one", "response": "1"}, "", {"prompt": "two", "response": "2", "source": None})
    second = tmp_path / "more.jsonl.gz"
    second.write_bytes(gzip.compress(b'{"prompt": "three", "response": "\\u00e9 \\ud83c\\udf5a"}'))  # no newline
    assert read_demonstrations([str(first), second]) == [
        Demonstration("one", "1"),
        Demonstration("two", "2"),
        Demonstration("three", "é 🍚"),
    ]


def test_text_may_hold_other_line_separators(write_lines):
    text = "one\u2028two\x0bthree\r\nfour\x85"
    line = json.dumps({"prompt": text, "response": "1"}, ensure_ascii=False) + "\r"
    assert read_demonstrations([write_lines(line)]) == [Demonstration(text, "1")]


def test_prompts_with_and_without_labels(write_lines):
    file = write_lines(
        {"prompt": "a"},
        {"prompt": "b", "red_team": True, "category": "privacy_violation"},
        {"prompt": "c", "red_team": False, "category": None},
    )
    assert read_prompts([file]) == [Prompt("a"), Prompt("b", True, "privacy_violation"), Prompt("c", False, None)]


def test_empty_responses_only_in_comparisons(write_lines):
    file = write_lines(GOOD | {"response_0": "", "response": ""})
    assert read_comparisons([file])[0].response_0 == ""
    with pytest.raises(UserError, match="field 'response': expected a string that is not empty"):
        read_demonstrations([file])


def without(name):
    return {key: value for key, value in GOOD.items() if key != name}


ROWS = {
    "missing prompt": (without("prompt"), "field 'prompt': expected a string, found no such field (fields: response"),
    "empty prompt": (GOOD | {"prompt": ""}, "field 'prompt': expected a string that is not empty, found 0 blank"),
    "blank prompt": (GOOD | {"prompt": " \n"}, "field 'prompt': expected a string that is not empty, found 2 blank"),
    "null prompt": (GOOD | {"prompt": None}, "field 'prompt': expected a string, found null"),
    "number prompt": (GOOD | {"prompt": 12.5}, "field 'prompt': expected a string, found the number 12.5"),
    "huge number": (GOOD | {"prompt": 10**99}, f"expected a string, found the number 1{'0' * 36}..."),
    "list response": (GOOD | {"response_0": [SECRET]}, "field 'response_0': expected a string, found a list of 1 entr"),
    "object response": (GOOD | {"response_1": {SECRET: 1}}, "expected a string, found an object of 1 entr"),
    "half a pair": (json.dumps(GOOD | {"response_1": "a\ud83c"}), "expected valid Unicode text, found half a "),
    "id 2": (GOOD | {"better_response_id": 2}, "'better_response_id': expected 0, 1 or \"tie\", found the number 2"),
    "id -1": (GOOD | {"safer_response_id": -1}, "'safer_response_id': expected 0, 1 or \"tie\", found the number -1"),
    "id 1.0": (GOOD | {"safer_response_id": 1.0}, "_response_id': expected 0, 1 or \"tie\", found the number 1.0"),
    "id true": (GOOD | {"safer_response_id": True}, "_response_id': expected 0, 1 or \"tie\", found the bool true"),
    "id quoted": (GOOD | {"better_response_id": "0"}, "expected 0, 1 or \"tie\", found the string \"0\""),
    "id text": (GOOD | {"better_response_id": SECRET}, "expected 0, 1 or \"tie\", found a string of 32 characters"),
    "flag 1": (GOOD | {"is_response_0_safe": 1}, "'is_response_0_safe': expected true or false, found the number 1"),
    "flag quoted": (GOOD | {"is_response_1_safe": "True"}, "expected true or false, found the string \"True\""),
}  # fmt: skip


@pytest.mark.parametrize("row, message", ROWS.values(), ids=ROWS.keys())
def test_bad_rows_are_refused_by_file_line_and_field(row, message, write_lines):
    file = write_lines(GOOD, "", row, GOOD)
    with pytest.raises(UserError) as caught:
        read_comparisons([file])
    assert str(caught.value).startswith(f"{file}, line 3")  # blank lines count, as in an editor
    assert message in str(caught.value)
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "a", "red_team": "yes"}, "field 'red_team': expected true or false, found the string \"yes\""),
        ({"prompt": "a", "red_team": None}, "field 'red_team': expected true or false, found null"),
        ({"prompt": "a", "category": {"x": True}}, "field 'category': expected a string, found an object of 1 entries"),
        ({"prompt": "a", "category": ""}, "field 'category': expected a string that is not empty"),
        ({"red_team": True}, "field 'prompt': expected a string, found no such field (fields: red_team)"),
        ({}, "field 'prompt': expected a string, found no such field (fields: )"),
    ],
)
def test_bad_prompt_rows_are_refused(row, message, write_lines):
    with pytest.raises(UserError) as caught:
        read_prompts([write_lines({"prompt": "fine"}, row)])
    assert message in str(caught.value)
    assert ", line 2" in str(caught.value)


def test_one_bad_file_among_good_ones_is_named(write_lines):
    good = write_lines({"prompt": "a"}, name="good.jsonl")
    bad = write_lines({"prompt": 1}, name="bad.jsonl")
    with pytest.raises(UserError, match=r"bad\.jsonl, line 1, field 'prompt'"):
        read_prompts([good, bad])


# Dialogues, and labels that nobody asked.


@pytest.mark.parametrize("as_messages", [False, True])
def test_a_dialogue_as_history_or_as_messages(as_messages, write_lines):
    history = (("hello", "hi"), ("more", ""))
    context = {"history": history, "prompt": "last"}
    if as_messages:
        turns = [turn for exchange in (*history, ("last",)) for turn in exchange]
        context = {"messages": [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)]}
    answers = {"response_0": "a", "response_1": ""}
    file = write_lines(context | answers | {"response": "done"})
    assert read_prompts([file]) == [Prompt("last", history=history)]
    assert read_comparisons([file]) == [Comparison("last", "a", "", None, None, None, None, history=history)]
    if as_messages:
        file = write_lines({"messages": [*context["messages"], {"role": "assistant", "content": "done"}]})
    assert read_demonstrations([file]) == [Demonstration("last", "done", history)]


TALK = [{"role": "user", "content": SECRET}, {"role": "assistant", "content": SECRET}]
DIALOGUES = {
    "history text": ({"history": SECRET}, "field 'history': expected a list of [user, assistant] pairs, found a "),
    "a triple": ({"history": [["a", "b"], ["a", "b", "c"]]}, "'history[1]': expected a [user, assistant] pair, found "),
    "a blank user": ({"history": [[" ", "b"]]}, "'history[0][0]': expected a string that is not empty"),
    "a number": ({"history": [["a", 3]]}, "field 'history[0][1]': expected a string, found the number 3"),
    "both": ({"messages": TALK[:1]}, "field 'prompt': expected no such field beside 'messages', found a string of"),
    "messages text": ({"prompt": None, "messages": SECRET}, "field 'messages': expected a list of "),
    "no message": ({"prompt": None, "messages": [SECRET]}, "'messages[0]': expected an object with role and content"),
    "system": (
        {"prompt": None, "messages": [{"role": "system", "content": SECRET}, *TALK[:1]]},
        "field 'messages[0].role': expected user or assistant, found system",
    ),
    "no content": ({"prompt": None, "messages": [{"role": "user"}]}, "'messages[0].content': expected a string, "),
    "answered": ({"prompt": None, "messages": TALK}, "from a user's to a user's, found 2 turns, the last by assistant"),
    "twice": ({"prompt": None, "messages": TALK[:1] * 3}, "expected turns by user and assistant in turn, from a "),
    "nobody": ({"prompt": None, "messages": []}, "from a user's to a user's, found 0 turns"),
}  # fmt: skip


@pytest.mark.parametrize("row, message", DIALOGUES.values(), ids=DIALOGUES.keys())
def test_bad_dialogues_are_refused(row, message, write_lines):
    for read in (read_comparisons, read_prompts):
        with pytest.raises(UserError) as caught:
            read([write_lines(GOOD, GOOD | row)])
        assert ", line 2" in str(caught.value) and message in str(caught.value) and SECRET not in str(caught.value)


def test_a_demonstration_of_messages_ends_with_the_assistants_turn(write_lines):
    for messages in (TALK[:1], []):
        with pytest.raises(UserError, match="field 'messages': expected turns that end with the assistant's, found "):
            read_demonstrations([write_lines({"messages": messages})])


def test_a_missing_or_null_label_is_none_and_never_taken_from_another(write_lines):
    labels = ["better_response_id", "safer_response_id", "is_response_0_safe", "is_response_1_safe"]
    for name in labels:
        for row in (without(name), GOOD | {name: None}):
            (comparison,) = read_comparisons([write_lines(row)])
            assert {label: getattr(comparison, label) for label in labels} == {
                label: None if label == name else GOOD[label] for label in labels
            }


# What is written is read again.

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(str.strip)
histories = st.lists(st.tuples(texts, texts), max_size=2).map(tuple)
ids, flags = st.none() | st.integers(0, 1), st.none() | st.booleans()
harms = st.lists(texts, max_size=2, unique=True).map(tuple)
RECORDS = {
    "demonstrations": st.builds(Demonstration, texts, texts, histories),
    "comparisons": st.builds(Comparison, texts, texts, texts, ids, ids, flags, flags, harms, harms, histories),
    "prompts": st.builds(Prompt, texts, st.booleans(), st.none() | texts, histories, st.none() | texts),
}


@given(data=st.data(), kind=st.sampled_from(sorted(RECORDS)))
def test_what_is_written_is_read_again(tmp_path_factory, data, kind):
    records = data.draw(st.lists(RECORDS[kind], min_size=1, max_size=4))
    file = tmp_path_factory.mktemp("plain") / "rows.jsonl"
    file.write_text("".join(json.dumps(plain_row(record)) + "\n" for record in records))
    assert list(SOURCES["plain"][kind](read_rows([file]), Reading())) == records
