"""tools/prepare_data.py, as a person uses it: what it counts, what it writes, and that it shows no text."""

import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_safe.data.records import Comparison, Demonstration, Prompt
from megatron_safe.data.sources import plain_row, read_comparisons, read_demonstrations, read_prompts

TOOLS = Path(__file__).resolve().parents[2] / "tools"
REAL_DATA = Path(os.environ.get("MEGATRON_SAFE_DATA", TOOLS.parents[1] / "shared" / "data"))
REAL = {
    "hh-rlhf-harmless-base-test.jsonl.gz": ("hh-rlhf", "comparisons", 2312),
    "pku-saferlhf-pairs-2000.json": ("safe-unsafe-pairs", "comparisons", 2000),
    "alpaca-seed-tasks.jsonl": ("alpaca", "demonstrations", 175),
}
SECRET = "zyxwv"
HARMS = {"Violence": True, "Drugs": False}


@pytest.fixture(scope="module", autouse=True)
def modules():
    """The tool's own modules, found as `python tools/prepare_data.py` finds them."""
    handler = signal.getsignal(signal.SIGTERM)
    sys.path.insert(0, str(TOOLS))
    try:
        import data_statistics
        import prepare_data

        yield prepare_data, data_statistics
    finally:
        sys.path.remove(str(TOOLS))
        signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def tool(modules, capsys):
    """tool(*arguments) -> exit code, stdout, stderr lines."""

    def run(*arguments):
        code = modules[0].main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return code, said.out, said.err.splitlines()

    return run


def write(path, records):
    path.write_text("".join(json.dumps(r if isinstance(r, dict) else plain_row(r)) + "\n" for r in records))
    return path


PAIRS = [
    Comparison(f"{SECRET} one two", "a b", "c", 0, 0, True, True),
    Comparison(f"{SECRET} One, two!", "a b", "c", 0, 1, False, True, ("Violence",)),
    Comparison(f"{SECRET} three", "a b c d", "", 1, 1, False, True, ("Violence", "Drugs")),
    Comparison("last", "a", "b", 1, 0, False, True, history=((f"{SECRET} three", "no"),)),
    Comparison("four", "a", "b", 1, None, None, True),
    Comparison("four", "a", "b", 1, None, None, True),
]


def test_inspect_counts(tool, tmp_path):
    rows = [*map(plain_row, PAIRS), {"prompt": SECRET, "response_0": 3, "response_1": SECRET}]
    data, other = write(tmp_path / "pairs.jsonl", rows), write(tmp_path / "other.jsonl", [PAIRS[4]])
    code, out, _ = tool("inspect", data, "--against", other, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert code == 0 and found["rows"] == 6 and found["exchanges"] == {"1": 5, "2": 1}
    assert found["better_response_id"] == {"0": 2, "1": 4, "not asked": 0}
    assert found["safer_response_id"] == {"0": 2, "1": 2, "not asked": 2}
    assert (found["both_asked"], found["disagree"], found["safer_is_the_unsafe_one"]) == (4, 2, 1)
    assert found["answers"] == {"safe": 7, "unsafe": 3, "not asked": 2}
    assert found["pairs"] == {"one safe": 3, "not asked": 2, "both safe": 1}
    assert found["categories"] == {"Violence": 2, "Drugs": 1}
    assert found["duplicates"] == {"equal_rows": 1, "openings": 3, "near_openings": 0}
    assert found["leaks"] == {"against": str(other), "rows": 6, "same_opening": 2, "near_opening": 0}
    lengths = found["lengths"]
    assert found["unit"] == "word" and lengths["prompt"]["mean"] == pytest.approx((3 + 3 + 2 + 1 + 1 + 1) / 6)
    assert lengths["response"]["counts"] == [1, 8, 2, 1, 0][: len(lengths["response"]["counts"])]
    assert lengths["history"]["texts"] == 2
    (note,) = found["notes"]
    assert "1 bad rows skipped, field 'response_0': expected a string" in note
    for part in ("helpful and safe disagree   2 (50.0%) of 4", "harm: Violence", note, "the same words"):
        assert part in out
    assert (tmp_path / "out" / "summary.png").read_bytes().startswith(b"\x89PNG")
    assert SECRET not in out and SECRET not in json.dumps(found)


def test_lengths_in_tokens_and_other_kinds(tool, tmp_path, project):
    data = write(tmp_path / "prompts.jsonl", [Prompt("w1 w2, w3", True, "theft"), Prompt("w1")])
    tokenizer = project.data / "tokenizer"
    code, out, _ = tool("inspect", data, "--kind", "prompts", "--tokenizer", tokenizer, "--out", tmp_path / "out")
    said = " ".join(out.split())
    assert code == 0 and "tokens in a prompt mean 2.0" in said and "red-team prompts 1 (50.0%)" in said
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["categories"] == {"theft": 1}
    data = write(tmp_path / "d.jsonl", [Demonstration("a", "b c")])
    code, out, _ = tool("inspect", data, "--kind", "demonstrations")
    assert code == 0 and "words in a response mean 2.0" in " ".join(out.split()) and "safer" not in out


# Duplicates.


def similarity(a, b):
    runs = [{text[i : i + 5] for i in range(max(1, len(text) - 4))} for text in (a, b)]
    return len(runs[0] & runs[1]) / len(runs[0] | runs[1])


WORDS = ["fern", "lamp", "water", "rice", "green", "warm"]
texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map(" ".join)


@settings(max_examples=30)
@given(one=st.sets(texts, min_size=1, max_size=8), other=st.sets(texts, min_size=1, max_size=8), alone=st.booleans())
def test_near_duplicates_are_near(modules, one, other, alone):
    """Against all pairs: none too far, none missed that is clearly near (MinHash may miss one at the limit)."""
    statistics = modules[1]
    found = statistics.near_pairs(one) if alone else statistics.near_pairs(one, other)
    others = one if alone else other
    assert all(similarity(a, b) >= statistics.NEAR and a != b and b in others for a, b in found)
    clear = {a for a in one if any(a != b and similarity(a, b) >= 0.85 for b in others)}
    assert clear <= {a for a, _ in found}


def test_near_leaks_are_counted_apart_from_equal_ones(modules):
    prompt = "how do I keep a small fern alive in a dark room all winter long"
    records = [Prompt(prompt), Prompt(prompt.upper() + "?"), Prompt(prompt.replace("small", "large")), Prompt("rice")]
    assert modules[1].leaks(records, [Prompt(prompt)]) == {"rows": 4, "same_opening": 2, "near_opening": 1}


# Files.


def test_convert_writes_what_is_read_again(tool, tmp_path):
    data, out = write(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "new" / "out.jsonl"
    assert tool("convert", data, data, "--out", out)[0] == 0
    assert read_comparisons([out]) == PAIRS * 2
    seeds = {"instruction": "Add.", "instances": [{"input": "1", "output": "2"}, {"input": "2", "output": "3"}]}
    data = write(tmp_path / "seeds.jsonl", [seeds])
    assert tool("convert", data, "--source", "alpaca", "--kind", "demonstrations", "--out", out)[0] == 0
    assert read_demonstrations([out]) == [Demonstration("Add. 1", "2"), Demonstration("Add. 2", "3")]
    assert tool("convert", data, "--source", "alpaca", "--kind", "prompts", "--out", out)[0] == 0
    assert read_prompts([out]) == [Prompt("Add. 1"), Prompt("Add. 2")]
    assert [path.name for path in out.parent.iterdir()] == ["out.jsonl"]


def test_what_is_refused_is_one_line_and_leaves_the_old_file(tool, tmp_path):
    out = write(tmp_path / "out.jsonl", PAIRS[:1])
    before = out.read_bytes()
    bad = write(tmp_path / "bad.jsonl", [PAIRS[0], {"prompt": SECRET}])
    for arguments, message in (
        (("convert", bad, "--out", out), "bad.jsonl, line 2, field 'response_0': expected a string, found no such"),
        (("convert", out, "--source", "alpaca", "--out", out), "source: expected one that gives comparisons (plain, "),
        (("convert", tmp_path / "none", "--out", out), "expected a .jsonl, .json (either also"),
        (("convert", out, "--out", bad / "x.jsonl"), "x.jsonl: cannot be written: "),
        (("split", out, "--out", tmp_path, "--fraction", "1.5"), "--fraction: expected a number between 0 and 1, "),
        (("split", out, "--out", tmp_path), "expected rows on both sides, found none for "),
    ):
        code, _, lines = tool(*arguments)
        assert code == 2 and len(lines) == 1 and lines[0].startswith("prepare_data: error: ") and message in lines[0]
        assert SECRET not in lines[0]
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "out.jsonl"]


def test_split_keeps_what_begins_alike_together(tool, tmp_path):
    dialogues = [
        record
        for n in range(300)
        for record in (
            Demonstration(f"Start {n}", "a"), Demonstration(f"start, {n}!", "b"),
            Demonstration("more", "c", ((f"Start {n}", "a"),)),
        )
    ]  # fmt: skip
    data = write(tmp_path / "d.jsonl", dialogues)
    sides = {}
    for seed in (0, 0, 1):
        out = tmp_path / f"out{seed}"
        form = ("--kind", "demonstrations", "--fraction", "0.2")
        assert tool("split", data, *form, "--seed", seed, "--out", out)[0] == 0
        found = {name: read_demonstrations([out / f"{name}.jsonl"]) for name in ("train", "test")}
        assert sides.setdefault(seed, found) == found
        assert Counter(found["train"] + found["test"]) == Counter(dialogues)
        assert 60 - 35 < len(found["test"]) / 3 < 60 + 35  # five standard deviations
        starts = [
            {(r.history[0][0] if r.history else r.prompt).lower().replace(",", "").rstrip("!") for r in side}
            for side in found.values()
        ]
        assert not starts[0] & starts[1]
    assert sides[0] != sides[1]
    # Where a prompt goes depends on nothing else in the file.
    few = write(tmp_path / "few.jsonl", dialogues[:90])
    assert tool("split", few, *form, "--out", tmp_path / "few")[0] == 0
    assert set(read_demonstrations([tmp_path / "few" / "test.jsonl"])) == set(sides[0]["test"]) & set(dialogues[:90])


@pytest.mark.parametrize("name", REAL)
def test_real_files(tool, tmp_path, name):
    if not (REAL_DATA / name).exists():
        pytest.skip(f"no real data at {REAL_DATA / name}; set MEGATRON_SAFE_DATA to its folder")
    source, kind, rows = REAL[name]
    form = ("--source", source, "--kind", kind)
    assert tool("inspect", REAL_DATA / name, *form, "--out", tmp_path)[0] == 0
    assert json.loads((tmp_path / "summary.json").read_text())["rows"] == rows
    assert tool("split", REAL_DATA / name, *form, "--out", tmp_path)[0] == 0
    code, out, _ = tool("inspect", tmp_path / "test.jsonl", "--kind", kind, "--against", tmp_path / "train.jsonl")
    assert code == 0 and "  the same words            0 (0.0%)" in out
