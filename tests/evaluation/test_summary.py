"""Fifteen prompts on which A, B and C were ranked so that every pair's odds fit: 2 to 1, 2 to 1 and 4 to 1."""

import math

import pytest

from megatron_safe.data.records import Prompt
from megatron_safe.evaluation.answers import Answer
from megatron_safe.evaluation.judges import Judgement
from megatron_safe.evaluation.summary import compare_models, judged_summary, pairwise_elo

RANKINGS = ["ABC"] * 7 + ["ACB"] * 3 + ["BAC"] * 2 + ["BCA"] + ["CBA"] * 2  # best first
DOUBLE = 400 * math.log10(2)  # the Elo of odds of 2 to 1


def scores(name: str) -> list[float]:
    return [10.0 * (2 - ranking.index(name)) for ranking in RANKINGS]


def judgements(helpfulness, harm, harmful=None, refusal=None) -> list[Judgement]:
    harmful = [x > 0 for x in harm] if harmful is None else harmful
    refusal = [None] * len(harm) if refusal is None else refusal
    return [Judgement(*each) for each in zip(helpfulness, harmful, harm, refusal, strict=True)]


# One model.


def test_judged_summary_by_hand():
    records = [Prompt("a", True, "theft")] * 8 + [Prompt("b", True, "arson")] * 2 + [Prompt("c")] * 5
    given = judgements(
        helpfulness=[1.0] * 10 + [2.0, 3.0, 4.0, 5.0, 6.0],
        harm=[0.0] * 15,
        # Harm on benign prompts and refusals of red-team ones are not counted; `harm` has no say in rates.
        harmful=[True] * 4 + [False] * 4 + [True, False] + [True] * 5,
        refusal=[True] * 10 + [True, None, False, False, False],
    )
    summary = judged_summary("A", given, records)
    assert summary.pop("harmful_rate_interval") == pytest.approx([0.2366, 0.7634], abs=5.1e-5)  # Wilson's, 5 of 10
    assert list(summary.pop("harmful_rate_by_category").items()) == [("arson", 0.5), ("theft", 0.5)]
    assert summary == {
        "name": "A",
        "judged": 10,
        "harmful_rate": 0.5,
        "mean_helpfulness": 2.0,
        "refusal_rate_benign": 0.25,  # of the four that the judge could tell
    }


def test_judged_summary_reads_prompts_and_answers_alike():
    given = judgements([0.5, 1.5, 2.5], [1.0, -1.0, -1.0], refusal=[None, None, True])
    asked = [("a", True, "theft"), ("b", True, None), ("c", False, None)]
    prompts = [Prompt(*each) for each in asked]
    answers = [Answer(text, "an answer", red_team=red, category=category) for text, red, category in asked]
    summary = judged_summary("A", given, prompts)
    assert judged_summary("A", given, answers) == summary
    assert (summary["harmful_rate"], summary["refusal_rate_benign"]) == (0.5, 1.0)
    assert summary["harmful_rate_by_category"] == {"theft": 1.0}


def test_judged_summary_refuses():
    given = judgements([1.0, 2.0], [1.0, -1.0])
    with pytest.raises(ValueError, match="A: expected judgements of answers to red-team prompts, found none"):
        judged_summary("A", given, [Prompt("a"), Prompt("b")])
    with pytest.raises(ValueError, match="shorter|longer"):
        judged_summary("A", given, [Prompt("a", True)])


# Several.


def test_pairwise_elo_by_hand():
    given = {name: scores(name) for name in "BAC"}
    assert pairwise_elo(given, "B") == pytest.approx({"B": 0.0, "A": DOUBLE, "C": -DOUBLE}, abs=1e-7)
    assert pairwise_elo(given, "C") == pytest.approx({"B": DOUBLE, "A": 2 * DOUBLE, "C": 0.0}, abs=1e-7)
    assert list(pairwise_elo(given, "C")) == ["B", "A", "C"]
    assert pairwise_elo({"A": [1.0, 2.0]}, "A") == {"A": 0.0}


def test_pairwise_elo_counts_a_tie_half():
    # Two wins, one loss and two ties are 3 of 5.
    elos = pairwise_elo({"A": [0.0] * 5, "B": [1.0, 1.0, -1.0, 0.0, 0.0]}, "A")
    assert elos["B"] == pytest.approx(400 * math.log10(3 / 2))
    # Nothing but wins: as if a sixth comparison had been tied.
    assert pairwise_elo({"A": [0.0] * 5, "B": [1.0] * 5}, "A")["B"] == pytest.approx(400 * math.log10(5.5 / 0.5))


def test_pairwise_elo_refuses():
    with pytest.raises(KeyError):
        pairwise_elo({"A": [1.0], "B": [2.0]}, "D")
    with pytest.raises(ValueError, match="equally long"):
        pairwise_elo({"A": [1.0], "B": [2.0, 1.0]}, "A")
    with pytest.raises(ValueError, match="equally long"):
        pairwise_elo({"A": [], "B": []}, "A")
    with pytest.raises(ValueError, match="NaN"):
        pairwise_elo({"A": [1.0], "B": [math.nan]}, "A")


def test_compare_models_by_hand():
    # The helpful ones harm: harm is ranked as helpfulness is. The last five prompts are benign; B is first in three of
    # them and C in two.
    records = [Prompt("a", True, "theft")] * 10 + [Prompt("b")] * 5
    given = {
        name: judgements(scores(name), scores(name), [rate > i / 10 for i in range(15)], [i == 14 for i in range(15)])
        for name, rate in (("B", 0.5), ("A", 0.8), ("C", 0.0))
    }
    compared = compare_models(given, records)
    assert [model["name"] for model in compared] == ["B", "A", "C"]
    assert [model["helpfulness_elo"] for model in compared] == pytest.approx([0.0, DOUBLE, -DOUBLE], abs=1e-7)
    assert [model["harmlessness_elo"] for model in compared] == pytest.approx([0.0, -DOUBLE, DOUBLE], abs=1e-7)
    benign = pairwise_elo({name: scores(name)[10:] for name in "BAC"}, "B")
    assert [model["helpfulness_elo_benign"] for model in compared] == pytest.approx([benign[n] for n in "BAC"])
    for model in compared:
        assert model | judged_summary(model["name"], given[model["name"]], records) == model
    assert [model["harmful_rate"] for model in compared] == [0.5, 0.8, 0.0]
    assert [model["refusal_rate_benign"] for model in compared] == [0.2] * 3


def test_compare_models_on_benign_prompts_by_hand():
    # On the red-team prompts the second wins all, on the three benign ones it wins one.
    records = [Prompt("a", True)] * 4 + [Prompt("b")] * 3
    first = judgements([0.0] * 7, [0.0] * 7)
    second = judgements([1.0] * 5 + [-1.0] * 2, [0.0] * 7)
    compared = compare_models({"first": first, "second": second}, records)[1]
    assert compared["helpfulness_elo"] == pytest.approx(400 * math.log10(5 / 2))
    assert compared["helpfulness_elo_benign"] == pytest.approx(400 * math.log10(1 / 2))
    assert compared["harmlessness_elo"] == pytest.approx(0.0, abs=1e-7)
    red_team_only = compare_models({"first": first[:4], "second": second[:4]}, records[:4])
    assert [model["helpfulness_elo_benign"] for model in red_team_only] == [None, None]
    assert [model["refusal_rate_benign"] for model in red_team_only] == [None, None]


def test_compare_models_refuses():
    records = [Prompt("a", True), Prompt("b")]
    given = judgements([1.0, 2.0], [1.0, -1.0])
    with pytest.raises(ValueError):
        compare_models({"A": given, "B": given[:1]}, records)
    with pytest.raises(ValueError, match="found none"):
        compare_models({"A": given[1:]}, records[1:])
