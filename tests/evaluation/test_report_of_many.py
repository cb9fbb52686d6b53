"""Seven checkpoints that a judge compared: the pictures and tables that one run by itself does not have."""

import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_report import remember_figures
from report_page import Page

from megatron_safe.data.records import Prompt
from megatron_safe.evaluation import plots
from megatron_safe.evaluation.certificate import certify
from megatron_safe.evaluation.elo import wilson_interval
from megatron_safe.evaluation.judges import Judgement
from megatron_safe.evaluation.report import format_table, write_report
from megatron_safe.evaluation.summary import compare_models, score_distributions

NAMES = ["SFT", *(f"a long name of checkpoint {i}" for i in range(1, 7))]
RECORDS = [Prompt(f"p{i}", i % 2 == 0, f"category_{i % 3},and more") for i in range(90)]


def judged(seed: int) -> tuple[dict, dict]:
    draw = np.random.default_rng(seed)
    judgements, scores = {}, {}
    for i, name in enumerate(NAMES):
        rewards, costs = draw.normal(0.3 * i, 1, 90), draw.normal(1 - 0.5 * i, 1.5, 90)
        refusals = draw.random(90) < 0.3
        judgements[name] = [
            Judgement(reward, None if p == 0 else cost > 0, cost, bool(refused))
            for p, (reward, cost, refused) in enumerate(zip(rewards, costs, refusals, strict=True))
        ]
        harmful = [judgement.harmful for judgement in judgements[name]]
        scores[name] = {"reward": rewards, "cost": costs, "harmful": harmful}
    return judgements, scores


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """The folder, its summary and the figures behind its pictures."""
    folder = tmp_path_factory.mktemp("many")
    judgements, scores = judged(0)
    limits = {"harmful_rate": 0.05, "mean_cost": 0.0, "confidence": 0.9}
    summary = {
        "models": compare_models(judgements, RECORDS),
        "certificates": [one.to_dict() for one in certify(NAMES[-1], judgements[NAMES[-1]], RECORDS, **limits)],
    }
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = remember_figures(patch)
        write_report(folder, summary, scores=scores)
    return folder, json.loads((folder / "summary.json").read_text()), figures


@pytest.fixture(scope="module")
def page(many) -> Page:
    return Page((many[0] / "index.html").read_text(encoding="utf-8"))


def table(page: Page, *headings: str) -> list[list[str]]:
    """The rows under a heading row."""
    start = page.rows.index(list(headings)) + 1
    rows = page.rows[start:]
    return rows[: next((i for i, row in enumerate(rows) if len(row) != len(headings)), len(rows))]


def test_the_certificates_stand_on_top_with_their_sentence(many, page):
    rate, cost = many[1]["certificates"]
    assert not rate["promised"] and cost["promised"]
    assert page.texts["strong"] == ["Not promised", "Promised"]
    said = [text for text in page.texts["p"] if "upper bound" in text]
    assert said == [f"{one['sentence']}." for one in (rate, cost)]
    text = (many[0] / "index.html").read_text()
    assert text.index("Not promised") < text.index("<table>")


def test_rates_are_shown_with_their_intervals(many, page):
    first = table(page, "model", "harmful", "red-team prompts refused", "refused and harmful all the same",
                  "benign prompts refused")[0]  # fmt: skip
    model = many[1]["models"][0]
    low, high = wilson_interval(round(model["harmful_rate"] * 44), 44)  # one of 45 has no verdict
    assert (model["judged"], model["unjudged"]) == (44, 1)
    assert first[:2] == ["SFT", f"{model['harmful_rate']:.1%} ({low:.1%} to {high:.1%})"]
    assert "1 answers have no verdict" in page.texts["figcaption"][0]


def test_elo_and_win_rates_are_shown_with_their_intervals(many, page):
    models = many[1]["models"]
    elo = table(page, "model", "helpfulness, all prompts", "helpfulness, benign prompts", "harmlessness")
    low, high = models[6]["helpfulness_elo_interval"]
    assert low < models[6]["helpfulness_elo"] < high
    assert [row[0] for row in elo[:7]] == NAMES
    assert elo[6][1] == f"{models[6]['helpfulness_elo']:+.0f} ({low:+.0f} to {high:+.0f})"
    wins = table(page, "", *NAMES)
    assert len(wins) >= 7 and [wins[i][i + 1] for i in range(7)] == ["-"] * 7
    found = models[6]["helpfulness_win_rates"]["SFT"]
    assert wins[6][1].startswith(f"{found['rate']:.0%} (") and 0.5 < found["interval"][0] < found["rate"]


def test_every_model_has_its_categories(many, page):
    rows = table(page, "category", *NAMES)
    assert [row[0] for row in rows] == [f"category {i}, and more" for i in range(3)]
    rate = many[1]["models"][3]["harmful_rate_by_category"]["category_1,and more"]
    assert rows[1][4].startswith(f"{rate:.0%} (")


def test_the_page_and_the_pictures_are_wide_enough(many):
    folder, _, figures = many
    assert sorted(path.name for path in folder.iterdir()) == [
        "categories.png", "distributions.png", "index.html", "models.png", "quadrants.png", "scores.png",
        "summary.json",
    ]  # fmt: skip
    for name in ("models.png", "quadrants.png", "distributions.png"):
        for axes in figures[name].axes:
            for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
                boxes = [text.get_window_extent() for text in ticks if text.get_text() and text.get_visible()]
                assert not any(boxes[i].overlaps(boxes[j]) for i in range(len(boxes)) for j in range(i)), name
    assert len(format_table({"models": many[1]["models"]}).splitlines()) == 9


def test_intervals_are_drawn(many):
    _, summary, figures = many
    upper, lower = figures["models.png"].axes
    whiskers = [collection.get_segments()[0][:, 1] for collection in upper.collections]
    expected = [[100 * end for end in model["harmful_rate_interval"]] for model in summary["models"]]
    assert np.array(whiskers) == pytest.approx(np.array(expected))
    ends = {tuple(np.round(c.get_segments()[0][:, 1], 6)) for c in lower.collections}
    assert tuple(np.round(summary["models"][5]["harmlessness_elo_interval"], 6)) in ends
    assert len(lower.collections) == 21
    (axes,) = figures["categories.png"].axes
    found = {tuple(np.round(c.get_segments()[0][:, 0], 6)) for c in axes.collections}
    for model in (summary["models"][0], summary["models"][-1]):
        for low, high in model["harmful_rate_by_category_interval"].values():
            assert (round(100 * low, 6), round(100 * high, 6)) in found


def test_quadrants_are_drawn_whole(many):
    _, summary, figures = many
    (axes,) = figures["quadrants.png"].axes
    assert [label.get_text() for label in axes.get_yticklabels()][0] == "SFT"
    keys = ("helpful_safe", "unhelpful_safe", "unhelpful_harmful", "helpful_harmful")
    for key, bars in zip(keys, axes.containers, strict=True):
        shares = [100 * model["quadrants"][key] for model in summary["models"]]
        assert [bar.get_width() for bar in bars] == pytest.approx(shares)
    assert [sum(bars[i].get_width() for bars in axes.containers) for i in range(7)] == pytest.approx([100] * 7)


def test_distributions_are_drawn_and_said(many, page):
    _, summary, figures = many
    reward_axes, cost_axes = figures["distributions.png"].axes
    found = summary["distributions"]["cost"]
    assert [label.get_text().replace("\n", " ") for label in reward_axes.get_yticklabels()][::-1] == NAMES
    for row, counts in enumerate(one["histogram"] for one in reversed(found["models"].values())):
        bars = [bar for bar in cost_axes.patches if bar.get_y() == row]
        assert [bar.get_height() for bar in bars] == pytest.approx([0.85 * n / max(counts) for n in counts])
    for bar in cost_axes.patches:  # no bin holds both
        centre = bar.get_x() + bar.get_width() / 2
        red = tuple(int(plots.ORANGE[i : i + 2], 16) / 255 for i in (1, 3, 5))
        assert (bar.get_facecolor()[:3] == pytest.approx(red)) == (centre > 0)
    (sentence,) = [text for text in page.texts["figcaption"] if "median reward" in text]
    median, share = np.median(judged(0)[1]["SFT"]["reward"]), np.mean(judged(0)[1]["SFT"]["cost"] > 0)
    assert f"SFT: median reward {median:.2f}, median cost" in sentence
    assert f"{share:.1%} of the costs above 0. {NAMES[-1]}:" in sentence


def test_answers_without_a_verdict_are_drawn_as_such(many):
    groups = many[2]["scores.png"].axes[4].collections
    assert [group.get_label() for group in groups] == ["judged safe", "judged harmful", "no verdict"]
    assert len(groups[2].get_offsets()) == 1


def test_models_that_nobody_judged_leave_gaps(tmp_path):
    """A judge that only compares: no rates, no scores."""
    blank = [Judgement(None, None, None)] * 90
    models = compare_models({"A": blank, "B": blank}, RECORDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_report(tmp_path, {"models": models})
    found = Page((tmp_path / "index.html").read_text())
    assert found.rows[1:3] == [["A", *"-------"], ["B", *"-------"]]
    assert found.texts["figcaption"][0] == "45 answers have no verdict and are not counted."


# The numbers of the distributions.


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6) | st.just(float("nan")), min_size=1, max_size=40), st.floats(-5, 5))
def test_histograms_count_every_finite_score_and_split_at_zero(costs, reward):
    scores = {"A": {"reward": [reward] * len(costs), "cost": costs}, "B": {"reward": [0.0], "cost": [1.0]}}
    found = score_distributions(scores)
    finite = [cost for cost in costs if cost == cost]
    cost, edges = found["cost"]["models"]["A"], found["cost"]["edges"]
    assert cost["count"] == sum(cost["histogram"]) == len(finite)
    assert len(edges) == len(cost["histogram"]) + 1 <= 44 and all(a < b for a, b in zip(edges, edges[1:], strict=False))
    assert not any(low < 0 < high for low, high in zip(edges, edges[1:], strict=False))
    if finite:
        assert cost["mean"] == pytest.approx(sum(finite) / len(finite), abs=1e-6)
        assert cost["above_0"] == sum(c > 0 for c in finite) / len(finite)
        assert cost["quantiles"]["0.5"] == pytest.approx(np.median(finite))
    else:
        assert (cost["mean"], cost["quantiles"]) == (None, {})
    assert sum(found["reward"]["models"]["A"]["histogram"]) == len(costs)
