"""Reading rows, and refusing bad ones with a message that names the place and never repeats a text."""

import gzip
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_safe.data.records import Comparison, Demonstration, Prompt
from megatron_safe.data.sources import read_comparisons, read_demonstrations, read_prompts
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
    "missing id": (without("better_response_id"), "field 'better_response_id': expected 0 or 1, found no such field"),
    "missing flag": (without("is_response_1_safe"), "field 'is_response_1_safe': expected true or false, found no "),
    "empty prompt": (GOOD | {"prompt": ""}, "field 'prompt': expected a string that is not empty, found 0 blank"),
    "blank prompt": (GOOD | {"prompt": " \n"}, "field 'prompt': expected a string that is not empty, found 2 blank"),
    "null prompt": (GOOD | {"prompt": None}, "field 'prompt': expected a string, found null"),
    "number prompt": (GOOD | {"prompt": 12.5}, "field 'prompt': expected a string, found the number 12.5"),
    "huge number": (GOOD | {"prompt": 10**99}, f"expected a string, found the number 1{'0' * 36}..."),
    "list response": (GOOD | {"response_0": [SECRET]}, "field 'response_0': expected a string, found a list of 1 entr"),
    "object response": (GOOD | {"response_1": {SECRET: 1}}, "expected a string, found an object of 1 entr"),
    "half a pair": (json.dumps(GOOD | {"response_1": "a\ud83c"}), "expected valid Unicode text, found half a "),
    "id 2": (GOOD | {"better_response_id": 2}, "field 'better_response_id': expected 0 or 1, found the number 2"),
    "id -1": (GOOD | {"safer_response_id": -1}, "field 'safer_response_id': expected 0 or 1, found the number -1"),
    "id 1.0": (GOOD | {"safer_response_id": 1.0}, "field 'safer_response_id': expected 0 or 1, found the number 1.0"),
    "id true": (GOOD | {"safer_response_id": True}, "field 'safer_response_id': expected 0 or 1, found the bool true"),
    "id quoted": (GOOD | {"better_response_id": "0"}, "'better_response_id': expected 0 or 1, found the string \"0\""),
    "id null": (GOOD | {"better_response_id": None}, "field 'better_response_id': expected 0 or 1, found null"),
    "id text": (GOOD | {"better_response_id": SECRET}, "expected 0 or 1, found a string of 32 characters"),
    "flag 1": (GOOD | {"is_response_0_safe": 1}, "'is_response_0_safe': expected true or false, found the number 1"),
    "flag quoted": (GOOD | {"is_response_1_safe": "True"}, "expected true or false, found the string \"True\""),
    "not an object": ([SECRET], "expected a JSON object, found a list of 1 entries"),
    "a string": (f'"{SECRET}"', "expected a JSON object, found a string of 32 characters"),
    "null": ("null", "expected a JSON object, found null"),
    "cut JSON": (json.dumps(GOOD)[:-20], "expected a JSON object, found invalid JSON ("),
    "two objects": ('{"prompt": "a"} {}', "expected a JSON object, found invalid JSON (Extra data, column 17)"),
    "python dict": ("{'prompt': 'a'}", "expected a JSON object, found invalid JSON (Expecting property name"),
    "deep": ("[" * 100_000, "expected a JSON object, found JSON too deep"),
    "endless number": ('{"prompt": ' + "1" * 5000 + "}", "expected a JSON object, found JSON too deep or with"),
    "latin-1": (b'{"prompt": "\xe9"}', "expected UTF-8 text, found byte 0xe9 at column 13"),
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


def files():
    def no_file(tmp_path):
        return tmp_path / "gone.jsonl", "expected a .jsonl or .jsonl.gz file, found nothing there"

    def folder(tmp_path):
        return tmp_path, "expected a .jsonl or .jsonl.gz file, found a directory"

    def other_ending(tmp_path):
        (tmp_path / "pairs.json").write_text("[]")
        return tmp_path / "pairs.json", "expected a .jsonl or .jsonl.gz file, found a name that ends in '.json'"

    def empty(tmp_path):
        (tmp_path / "a.jsonl").write_text("")
        return tmp_path / "a.jsonl", "expected at least one row, found an empty file"

    def blank(tmp_path):
        (tmp_path / "a.jsonl").write_text("\n \n")
        return tmp_path / "a.jsonl", "expected at least one row, found an empty file"

    def not_gzip(tmp_path):
        (tmp_path / "a.jsonl.gz").write_text("{}")
        return tmp_path / "a.jsonl.gz", "found one that cannot be read (Not a gzipped file"

    def cut_gzip(tmp_path):
        packed = gzip.compress(json.dumps({"prompt": os.urandom(9999).hex(), "response": "a"}).encode())
        (tmp_path / "a.jsonl.gz").write_bytes(packed[:-200])
        return tmp_path / "a.jsonl.gz", "found one that cannot be read (Compressed file ended"

    def damaged_gzip(tmp_path):
        packed = bytearray(gzip.compress(b'{"prompt": "a", "response": "b"}\n'))
        packed[-6] ^= 0xFF  # in the checksum
        (tmp_path / "a.jsonl.gz").write_bytes(packed)
        return tmp_path / "a.jsonl.gz", "found one that cannot be read (CRC check failed"

    return [no_file, folder, other_ending, empty, blank, not_gzip, cut_gzip, damaged_gzip]


@pytest.mark.parametrize("make", files())
def test_bad_files_are_refused_by_name(make, tmp_path):
    path, message = make(tmp_path)
    with pytest.raises(UserError) as caught:
        read_demonstrations([path])
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_an_empty_list_of_files_is_refused():
    with pytest.raises(UserError, match="data files: expected at least one"):
        read_prompts([])


def test_one_bad_file_among_good_ones_is_named(write_lines):
    good = write_lines({"prompt": "a"}, name="good.jsonl")
    bad = write_lines({"prompt": 1}, name="bad.jsonl")
    with pytest.raises(UserError, match=r"bad\.jsonl, line 1, field 'prompt'"):
        read_prompts([good, bad])
