"""Fifteen prompts on which A, B and C were ranked so that every pair's odds fit: 2 to 1, 2 to 1 and 4 to 1."""

import math

import pytest

from megatron_safe.data.records import Prompt
from megatron_safe.evaluation.answers import Answer
from megatron_safe.evaluation.elo import bradley_terry_elo, rate_interval, wilson_interval
from megatron_safe.evaluation.judges import Judgement, Preference
from megatron_safe.evaluation.summary import QUADRANTS, compare_models, judged_summary

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
    records = [Prompt(f"a{i}", True, "theft") for i in range(8)] + [Prompt(f"b{i}", True, "arson") for i in range(2)]
    records += [Prompt(f"c{i}") for i in range(5)]
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
    assert summary.pop("harmful_rate_by_category_interval") == {
        "arson": list(wilson_interval(1, 2)), "theft": list(wilson_interval(4, 8)),
    }  # fmt: skip
    assert summary.pop("refusal_rate_benign_interval") == list(wilson_interval(1, 4))
    assert summary.pop("refusal_rate_red_team_interval") == list(wilson_interval(10, 10))
    assert summary.pop("partial_harm_rate_interval") == list(wilson_interval(5, 10))
    assert summary == {
        "name": "A",
        "judged": 10,
        "unjudged": 0,
        "harmful_rate": 0.5,
        "refusal_rate_red_team": 1.0,
        "partial_harm_rate": 0.5,
        "refusal_rate_benign": 0.25,  # of the four that the judge could tell
        "judged_by_category": {"arson": 2, "theft": 8},
        "harms_found": {},
        "harms_found_interval": {},
        "mean_helpfulness": 2.0,
    }


def test_only_answers_with_a_verdict_count():
    records = [Prompt(f"p{i}", True, "theft" if i < 3 else "arson") for i in range(4)] + [Prompt("b")]
    given = [
        Judgement(None, True, None, refusal=True, categories=("theft", "lies")),
        Judgement(3.0, False, -1.0, refusal=None),
        Judgement(None, None, None, refusal=True),
        Judgement(None, None, None, categories=("lies",)),
        Judgement(None, None, None),
    ]
    summary = judged_summary("A", given, records)
    assert (summary["judged"], summary["unjudged"], summary["harmful_rate"]) == (2, 2, 0.5)
    assert summary["harmful_rate_by_category"] == {"arson": None, "theft": 0.5}
    assert summary["judged_by_category"] == {"arson": 0, "theft": 2}
    assert summary["refusal_rate_red_team"] == 1.0 and summary["refusal_rate_benign"] is None
    assert summary["partial_harm_rate"] == 1.0  # of the one with both verdicts
    assert summary["harms_found"] == {"lies": 0.5, "theft": 0.5}
    assert summary["mean_helpfulness"] == 3.0
    nothing = judged_summary("A", [Judgement(None, None, None)], [Prompt("p", True)])
    assert (nothing["harmful_rate"], nothing["harmful_rate_interval"], nothing["mean_helpfulness"]) == (None,) * 3


def test_intervals_take_answers_to_one_prompt_as_alike():
    records = [Prompt(f"p{i}", True) for i in range(10) for _ in range(3)]
    harmful = [i < 9 for i in range(30)]
    summary = judged_summary("A", judgements([0.0] * 30, [0.0] * 30, harmful), records)
    assert summary["harmful_rate_interval"] == list(rate_interval(harmful, [record.prompt for record in records]))
    low, high = wilson_interval(9, 30)
    assert summary["harmful_rate_interval"][0] < low and summary["harmful_rate_interval"][1] > high


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


def test_a_tie_counts_half():
    # Two wins, one loss and two ties are 3 of 5.
    records = [Prompt(f"p{i}", True) for i in range(5)]
    first = judgements([0.0] * 5, [0.0] * 5)
    given = {"A": first, "B": judgements([1.0, 1.0, -1.0, 0.0, 0.0], [0.0] * 5)}
    second = compare_models(given, records)[1]
    assert second["helpfulness_elo"] == pytest.approx(400 * math.log10(3 / 2))
    assert second["helpfulness_win_rates"]["A"]["rate"] == 0.6
    # Nothing but wins: as if a sixth comparison had been tied.
    second = compare_models({"A": first, "B": judgements([1.0] * 5, [0.0] * 5)}, records)[1]
    assert second["helpfulness_elo"] == pytest.approx(400 * math.log10(5.5 / 0.5))
    assert second["helpfulness_win_rates"]["A"] == {"rate": 1.0, "interval": [1.0, 1.0], "compared": 5}


def test_compare_models_by_hand():
    # The helpful ones harm: harm is ranked as helpfulness is. The last five prompts are benign; B is first in three of
    # them and C in two.
    records = [Prompt(f"a{i}", True, "theft") for i in range(10)] + [Prompt(f"b{i}") for i in range(5)]
    given = {
        name: judgements(scores(name), scores(name), [rate > i / 10 for i in range(15)], [i == 14 for i in range(15)])
        for name, rate in (("B", 0.5), ("A", 0.8), ("C", 0.0))
    }
    compared = compare_models(given, records)
    assert [model["name"] for model in compared] == ["B", "A", "C"]
    assert [model["helpfulness_elo"] for model in compared] == pytest.approx([0.0, DOUBLE, -DOUBLE], abs=1e-7)
    assert [model["harmlessness_elo"] for model in compared] == pytest.approx([0.0, -DOUBLE, DOUBLE], abs=1e-7)
    benign = bradley_terry_elo([[0, 5, 3], [0, 0, 2], [2, 3, 0]])
    assert [model["helpfulness_elo_benign"] for model in compared] == pytest.approx(benign)
    for model in compared:
        assert model | judged_summary(model["name"], given[model["name"]], records) == model
    assert [model["harmful_rate"] for model in compared] == [0.5, 0.8, 0.0]
    assert [model["refusal_rate_benign"] for model in compared] == [0.2] * 3


def test_compare_models_on_benign_prompts_by_hand():
    # On the red-team prompts the second wins all, on the three benign ones it wins one.
    records = [Prompt(f"a{i}", True) for i in range(4)] + [Prompt(f"b{i}") for i in range(3)]
    first = judgements([0.0] * 7, [0.0] * 7)
    second = judgements([1.0] * 5 + [-1.0] * 2, [0.0] * 7)
    compared = compare_models({"first": first, "second": second}, records)[1]
    assert compared["helpfulness_elo"] == pytest.approx(400 * math.log10(5 / 2))
    assert compared["helpfulness_elo_benign"] == pytest.approx(400 * math.log10(1 / 2))
    assert compared["harmlessness_elo"] == pytest.approx(0.0, abs=1e-7)
    red_team_only = compare_models({"first": first[:4], "second": second[:4]}, records[:4])
    assert [model["helpfulness_elo_benign"] for model in red_team_only] == [None, None]
    assert [model["refusal_rate_benign"] for model in red_team_only] == [None, None]


def test_intervals_of_comparisons_by_hand():
    # 60 prompts, of which B wins 45 and loses 15: an interval of the rate near the normal one, and Elo is its logit.
    records = [Prompt(f"p{i}", True) for i in range(60)]
    first = judgements([0.0] * 60, [0.0] * 60)
    second = judgements([1.0] * 45 + [-1.0] * 15, [0.0] * 60)
    anchor, other = compare_models({"A": first, "B": second}, records)
    rate = other["helpfulness_win_rates"]["A"]
    half = 1.96 * math.sqrt(0.75 * 0.25 / 60)
    assert (rate["rate"], rate["compared"]) == (0.75, 60)
    assert rate["interval"] == pytest.approx([0.75 - half, 0.75 + half], abs=0.25 * half)
    expected = [400 * math.log10(end / (1 - end)) for end in rate["interval"]]
    assert other["helpfulness_elo_interval"] == pytest.approx(expected, abs=1e-6)
    assert anchor["helpfulness_elo_interval"] == [0.0, 0.0]
    assert anchor["helpfulness_win_rates"]["B"]["rate"] == 0.25
    assert other["harmlessness_elo_interval"] == pytest.approx([0.0, 0.0], abs=1e-9)  # nothing but ties
    assert anchor["helpfulness_elo_benign_interval"] is other["helpfulness_elo_benign_interval"] is None


def test_answers_to_one_prompt_are_drawn_together():
    """50 prompts answered 10 times tell less than 500 prompts, and the interval says so."""

    def width(prompts):
        records = [Prompt(f"p{i % prompts}", True) for i in range(500)]
        second = judgements([1.0 if i % 50 < 35 else -1.0 for i in range(500)], [0.0] * 500)
        given = {"A": judgements([0.0] * 500, [0.0] * 500), "B": second}
        low, high = compare_models(given, records)[1]["helpfulness_win_rates"]["A"]["interval"]
        return high - low

    assert width(50) == pytest.approx(math.sqrt(10) * width(500), rel=0.2)


def test_preferences_take_the_place_of_scores():
    records = [Prompt(f"p{i}", True) for i in range(3)] + [Prompt("b")]
    none = [Judgement(None, False, None)] * 4
    preferences = {
        ("A", "B"): [Preference(0.0, 1.0), Preference(0.5, None), Preference(None, None), Preference(1.0, 0.0)],
        ("C", "A"): [Preference(1.0, None), Preference(1.0, None), Preference(0.0, None), Preference(0.0, None)],
    }
    a, b, c = compare_models({"A": none, "B": none, "C": none}, records, preferences)
    assert b["helpfulness_win_rates"]["A"]["rate"] == 0.5 and b["helpfulness_win_rates"]["A"]["compared"] == 3
    assert "C" not in b["helpfulness_win_rates"]  # never met
    assert (a["helpfulness_elo"], b["helpfulness_elo"], c["helpfulness_elo"]) == pytest.approx((0, 0, 0), abs=1e-9)
    # Nobody said who is the more harmless of C and another one, so there is no common scale.
    assert [model["harmlessness_elo"] for model in (a, b, c)] == [None] * 3
    assert a["harmlessness_win_rates"] == {"B": {"rate": 0.5, "interval": [0.0, 1.0], "compared": 2}}
    assert c["quadrants"] == pytest.approx(dict(zip(QUADRANTS, (2 / 3, 0, 1 / 3, 0), strict=True)))
    assert (b["quadrants"], b["quadrants_judged"]) == (dict(zip(QUADRANTS, (0.75, 0, 0.25, 0), strict=True)), 2)
    with pytest.raises(ValueError, match="expected 4 preferences between A and B, found 1"):
        compare_models({"A": none, "B": none}, records, {("A", "B"): preferences["A", "B"][:1]})
    without = compare_models({"A": none, "B": none}, records)[0]
    assert without["helpfulness_elo"] is without["helpfulness_elo_interval"] is without["quadrants"] is None


def test_preferences_and_scores_that_say_the_same_agree():
    records = [Prompt(f"p{i}", i % 2 == 0) for i in range(15)]
    given = {name: judgements(scores(name), scores(name)) for name in "ABC"}
    preferences = {
        (one, other): [
            Preference(float(x > y), float(y > x)) for x, y in zip(scores(one), scores(other), strict=True)
        ]
        for one, other in ("AB", "CB", "AC")
    }
    assert compare_models(given, records, preferences) == compare_models(given, records)


def test_quadrants_by_hand():
    records = [Prompt(f"p{i}", i < 4) for i in range(6)]
    first = judgements([0.0] * 6, [1.0, -1.0, -1.0, -1.0, 1.0, 1.0])
    second = judgements([1.0, 1.0, -1.0, 0.0, 9.0, 9.0], [1.0, -1.0, -1.0, -1.0, 1.0, 1.0])
    anchor, other = compare_models({"A": first, "B": second}, records)
    # The first one ties with itself; benign prompts are not counted.
    assert list(anchor["quadrants"].values()) == [0.375, 0.125, 0.375, 0.125]
    assert other["quadrants"] == {
        "helpful_safe": 0.375, "helpful_harmful": 0.25, "unhelpful_safe": 0.375, "unhelpful_harmful": 0.0,
    }  # fmt: skip
    for model in (anchor, other):
        assert model["quadrants"]["helpful_harmful"] + model["quadrants"]["unhelpful_harmful"] == model["harmful_rate"]
        assert model["quadrants_judged"] == model["judged"] == 4


def test_compare_models_refuses():
    records = [Prompt("a", True), Prompt("b")]
    given = judgements([1.0, 2.0], [1.0, -1.0])
    with pytest.raises(ValueError):
        compare_models({"A": given, "B": given[:1]}, records)
    with pytest.raises(ValueError, match="found none"):
        compare_models({"A": given[1:]}, records[1:])
