"""Simulated annotators: PKU-SafeRLHF's columns, the rates of their errors, conflicts, and determinism."""

import hashlib
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "quickstart"))

import lexicon  # noqa: E402
from annotators import PKU_CATEGORIES, TO_PKU, annotate, write_comparisons  # noqa: E402
from judge import judge  # noqa: E402
from world import World  # noqa: E402

WORLD = World(0)


@pytest.fixture(scope="module")
def rows():
    """Pairs of answers to one question, as two samples of a supervised policy would be."""
    by_question = {}
    for prompt, response in WORLD.demonstrations(12_000, seed=1):
        record = WORLD.find(prompt)
        by_question.setdefault((record.category, record.topic, record.task), []).append((prompt, response))
    return [
        (prompt, response, other)
        for pairs in by_question.values()
        for (prompt, response), (_, other) in zip(pairs[0::2], pairs[1::2], strict=False)
    ]


def test_columns_are_those_of_pku_saferlhf(rows, tmp_path):
    write_comparisons(tmp_path / "new" / "comparisons.jsonl", annotate(WORLD, rows[:300], seed=0))
    lines = (tmp_path / "new" / "comparisons.jsonl").read_text().splitlines()
    assert len(lines) == 300
    columns = {"prompt", "prompt_source", "better_response_id", "safer_response_id"} | {
        column.format(i)
        for i in (0, 1)
        for column in (
            "response_{}", "response_{}_source", "is_response_{}_safe", "response_{}_harm_category",
            "response_{}_severity_level", "response_{}_sha256",
        )
    }  # fmt: skip
    for line, given_row in zip(lines, rows, strict=False):
        row = json.loads(line)
        assert set(row) == columns
        assert (row["prompt"], row["response_0"], row["response_1"]) == given_row
        assert row["better_response_id"] in (0, 1) and row["safer_response_id"] in (0, 1)
        for i in (0, 1):
            categories, safe = row[f"response_{i}_harm_category"], row[f"is_response_{i}_safe"]
            assert isinstance(safe, bool) and len(categories) == 19
            assert any(categories.values()) == (not safe)
            assert (row[f"response_{i}_severity_level"] == 0) == safe and row[f"response_{i}_severity_level"] <= 3
            assert row[f"response_{i}_sha256"] == hashlib.sha256(row[f"response_{i}"].encode()).hexdigest()


def test_the_fourteen_categories_map_to_fourteen_of_the_nineteen():
    assert len(set(PKU_CATEGORIES)) == 19
    assert set(TO_PKU) == set(lexicon.CATEGORIES)
    assert len(set(TO_PKU.values())) == 14 and set(TO_PKU.values()) <= set(PKU_CATEGORIES)


def test_harm_category_and_severity_name_what_the_answer_holds():
    first, second = list(lexicon.CATEGORIES)[:2]
    prompt = next(p for p in WORLD.prompts("dev", "red-team", 3, 500, seed=0) if p.category == first)
    one, *_ = WORLD.harmful_steps[second]
    mixed = " then ".join(f"{verb} the {noun}" for verb, noun in (WORLD.harmful_steps[first][0], one))
    full = " then ".join(f"{verb} the {noun}" for verb, noun in WORLD.harmful_steps[first])
    refusal = "i will not do that"
    expected = {mixed: ({first, second}, 2), full: ({first}, 3), refusal: ({first}, 1)}  # the last: a false alarm
    for response, (categories, severity) in expected.items():
        labels = annotate(WORLD, [(prompt.text, refusal, response)] * 50, seed=0)
        unsafe = [label for label in labels if not label["is_response_1_safe"]]
        assert unsafe
        for label in unsafe:
            named = {name for name, holds in label["response_1_harm_category"].items() if holds}
            assert named == {TO_PKU[category] for category in categories}
            assert label["response_1_severity_level"] == severity


def test_flip_rates_and_conflicts(rows):
    assert len(rows) > 5900
    labels = annotate(WORLD, rows, seed=0)
    truth = [(judge(WORLD, p, a), judge(WORLD, p, b)) for p, a, b in rows]

    sides = [
        (label[f"is_response_{i}_safe"], judgements[i].harmful)
        for label, judgements in zip(labels, truth, strict=True)
        for i in (0, 1)
    ]
    for harmful in (False, True):
        called_safe = [safe for safe, is_harmful in sides if is_harmful == harmful]
        expected = 0.1 if harmful else 0.9
        assert abs(sum(called_safe) / len(called_safe) - expected) < 4 * (0.09 / len(called_safe)) ** 0.5

    pairs = list(zip(labels, truth, strict=True))
    differ = [(label, a, b) for label, (a, b) in pairs if a.harmful != b.harmful]
    assert abs(sum(label["safer_response_id"] == b.harmful for label, a, b in differ) / len(differ) - 0.1) < 0.03
    ties = [label["safer_response_id"] for label, (a, b) in pairs if a.harmful == b.harmful]
    assert abs(sum(ties) / len(ties) - 0.5) < 0.04

    for difference in (-1.0, -0.25, 0.0, 0.25, 1.0):
        chosen = [
            label["better_response_id"] for label, (a, b) in pairs if b.helpfulness - a.helpfulness == difference
        ]
        expected = {-1.0: 0.1192, -0.25: 0.3775, 0.0: 0.5, 0.25: 0.6225, 1.0: 0.8808}[difference]  # sigmoid(2 d)
        assert len(chosen) > 150
        assert abs(sum(chosen) / len(chosen) - expected) < 4 * (expected * (1 - expected) / len(chosen)) ** 0.5

    # The reason for two models: among pairs that differ in harm, the more helpful answer is mostly the unsafe one.
    conflicts = sum(label["better_response_id"] != label["safer_response_id"] for label, _, _ in differ) / len(differ)
    assert 0.5 < conflicts < 0.85


def test_labels_depend_on_the_seed_and_the_row_alone(rows):
    labels = annotate(WORLD, rows[:200], seed=0)
    assert annotate(WORLD, rows[:200], seed=0) == labels
    assert annotate(WORLD, rows[100:200], seed=0) == labels[100:]
    assert annotate(WORLD, rows[:200], seed=1) != labels
    # The same row again gets fresh noise, so that errors about a frequent pair average out.
    repeated = annotate(WORLD, [("how do i mend the garden", "", "")] * 100, seed=0)
    for column in ("better_response_id", "safer_response_id", "is_response_0_safe"):
        assert {label[column] for label in repeated} == {0, 1}
