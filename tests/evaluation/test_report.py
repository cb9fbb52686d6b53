"""What a report says, against numbers worked out on paper; its pictures are in test_report_pictures.py."""

import base64
import json
import math
import warnings

import numpy as np
import pytest
from made_up_report import BASE, SUMMARY
from report_page import Page

from megatron_safe.errors import UserError
from megatron_safe.evaluation import plots
from megatron_safe.evaluation.report import format_table, write_report

PICTURES = ["models.png", "multiplier.png", "categories.png", "scores.png", "distributions.png", "ablations.png"]


@pytest.fixture(scope="module")
def page(drawn) -> Page:
    return Page((drawn[0] / "index.html").read_text(encoding="utf-8"))


@pytest.fixture
def undrawn(monkeypatch):
    """For what is only said: no picture is drawn."""
    for name in ("models", "multiplier", "categories", "scores", "ablations"):
        monkeypatch.setattr(plots, f"plot_{name}", lambda path, *_: path.write_bytes(b"no picture"))


def captions(folder, summary, **more) -> list[str]:
    write_report(folder, summary, **more)
    return Page((folder / "index.html").read_text(encoding="utf-8")).texts["figcaption"]


# summary.json.


def test_summary_json_is_the_summary_in_plain_types(drawn):
    text = (drawn[0] / "summary.json").read_text(encoding="utf-8")

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    found = json.loads(text, parse_constant=refuse)
    assert found["models"][1] == SUMMARY["models"][1] | {"mean_cost": None}
    assert found["models"][0] == SUMMARY["models"][0] and found["models"][2] == SUMMARY["models"][2]
    assert found["reward_model_accuracy"] == [0.7123, None]
    diverged = SUMMARY["ablations"]["points"][-1] | {"mean_reward": None}
    assert found["ablations"]["points"] == [*SUMMARY["ablations"]["points"][:-1], diverged]
    same = ("seed", "layout", "seconds", "cost_model_accuracy", "cost_model_sign_accuracy", "lambda_final")
    assert {key: found[key] for key in same} == {key: SUMMARY[key] for key in same}
    assert found.keys() == {*SUMMARY, "distributions"}
    assert "ν 10" in text  # for people too


def test_numpy_of_any_shape_and_keys_become_json(tmp_path, undrawn):
    summary = {
        "models": [{"name": "a", "harmful_rate": np.float32(0.5), "judged": np.int64(4)}],
        "odd": {1: np.array([[1.0, math.nan], [-math.inf, 2.0]]), "yes": np.bool_(True), "none": (), "n": 3},
    }
    write_report(tmp_path, summary)
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found["odd"] == {"1": [[1.0, None], [None, 2.0]], "yes": True, "none": [], "n": 3}
    assert found["models"] == [{"name": "a", "harmful_rate": 0.5, "judged": 4}]
    # What was read back makes the same report again, over the old one.
    before = (tmp_path / "index.html").read_text()
    write_report(tmp_path, found)
    assert json.loads((tmp_path / "summary.json").read_text()) == found
    assert (tmp_path / "index.html").read_text() == before


# The table.


def test_format_table():
    summary = {
        "models": [
            {"name": "SFT", "harmful_rate": 0.5308, "helpfulness_elo": 0.0, "mean_reward": -0.256, "mean_cost": 12.0},
            {"name": "the last round", "harmful_rate": 0.0, "helpfulness_elo": 244.91, "harmlessness_elo": -7.6,
             "helpfulness_elo_benign": None, "refusal_rate_benign": 0.0346},
        ]
    }  # fmt: skip
    assert format_table(summary).splitlines() == [
        "model           harmful  Elo, all  Elo, benign  harmlessness Elo  benign refused  mean reward  mean cost",
        "-" * 104,
        "SFT               53.1%        +0            -                 -               -        -0.26      12.00",
        "the last round     0.0%      +245            -                -8            3.5%            -          -",
    ]


# The page.


def test_the_page_holds_the_numbers(page):
    heading, *models = page.rows[:4]
    assert heading[:2] == ["model", "harmful"]
    assert models == [
        [BASE, "50.0%", "+0", "+0", "+0", "2.1%", "-0.25", "1.50"],
        ["round 1", "12.3%", "+100", "-", "-", "-", "-", "-"],
        ["round 2", "2.0%", "+245", "-12", "+268", "3.4%", "3.46", "-2.00"],
    ]
    assert page.rows[4:] == [
        ["run", "ν", "mean reward", "mean cost", "harmful", "Elo, all"],
        ["PPO-Lag", "-", "3.00", "-1.00", "2.0%", "+200"],
        ["PPO", "-", "5.00", "4.00", "60.0%", "-"],
        ["ν 1", "1", "3.50", "-1.00", "3.0%", "-"],
        ["ν 0.1", "0.1", "2.50", "0.00", "30.0%", "-"],
        ["ν 10", "10", "1.00", "-2.00", "1.0%", "-"],
        ["ν 100", "100", "3.00", "-1.00", "-", "-"],
        ["diverged", "0.5", "-", "9.00", "-", "-"],
    ]
    assert page.texts["p"][0] == "seed 7 · layout tp2 · 5.5 minutes"
    assert page.texts["p"][1].startswith(f"Elo is over {BASE};")
    assert list(zip(page.texts["dt"], page.texts["dd"], strict=True)) == [
        ("reward model accuracy", "71.2%, -"),
        ("cost model accuracy", "81.1%"),
        ("final λ", "0.125"),
    ]


def test_the_page_stands_alone(drawn, page):
    assert len(page.sources()) == len(PICTURES)
    for source, name in zip(page.sources(), PICTURES, strict=True):
        kind, data = source.split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data, validate=True) == (drawn[0] / name).read_bytes()
    assert sorted(path.name for path in drawn[0].iterdir()) == sorted([*PICTURES, "index.html", "summary.json"])
    text = (drawn[0] / "index.html").read_text(encoding="utf-8")
    for source in page.sources():
        text = text.replace(source, "")
    assert not any(word in text for word in ("http:", "https:", "//", "url(", "@import", "<script", "<link"))
    assert all(value for tag, name, value in page.attributes if name == "alt")


def test_the_page_escapes_what_it_is_given(drawn, page):
    text = (drawn[0] / "index.html").read_text(encoding="utf-8")
    assert "<b>" not in text and '& "co"' not in text
    assert any(BASE in caption for caption in page.texts["figcaption"])


# The sentences.


def test_the_sentences_say_what_is_drawn(page):
    assert page.texts["figcaption"] == [
        # Wilson's interval of 20 in 1,000, by hand: 0.02184 ± 0.00885.
        "round 2 answers 2.0% of the held-out red-team prompts harmfully (1,000 judged answers; 95% interval 1.3% to "
        f"3.1%); {BASE} answered 50.0% so. Its helpfulness Elo over {BASE} is +245 over all prompts and -12 on benign "
        "ones. It refuses 3.4% of the benign prompts.",
        "λ moved between 0.125 and 2.5 and ended at 0.125. J_C was above its threshold in 2 of 4 steps and ended at "
        "0.00 against -0.50. λ grows while J_C is above the line and shrinks while it is below.",
        # Of the three judged both times.
        f"From {BASE} to round 2 the harmful rate fell in 1 of 3 categories and rose in 1. "
        "The highest rate left is 40.0%, in arson.",
        f"{BASE}: mean reward 2.00, mean cost 0.17; the sign of the cost agrees with the judge on 66.7% of 3 answers. "
        "round 2: mean reward 4.50, mean cost -1.50; the sign of the cost agrees with the judge on 75.0% of 4 answers.",
        f"{BASE}: median reward 2.00, median cost 0.50, 66.7% of the costs above 0. round 2: median reward 4.50, "
        "median cost -1.50, 0.0% of the costs above 0. Each histogram is as tall as its highest bin; the black line is "
        "the median.",
        # The equal one counts on both sides, the one without a mean reward on none.
        "Of 4 fixed ν, 2 (ν = 1, 100) did at least as well as PPO-Lag in both mean reward and mean cost, and 2 "
        "(ν = 0.1, 100) at most as well in both. PPO ends with 60.0% harmful answers, PPO-Lag with 2.0%. Over the "
        "fixed ν the harmful rate goes from 1.0% to 30.0%. One run per point.",
    ]


def test_one_model_is_not_compared_with_itself(tmp_path, undrawn):
    model = {"name": "SFT", "harmful_rate": 0.25, "helpfulness_elo": 0.0, "harmful_rate_by_category": {"theft": 0.25}}
    assert captions(tmp_path, {"models": [model]}) == [
        "SFT answers 25.0% of the held-out red-team prompts harmfully."
    ]


def test_a_front_that_ppo_lag_is_on_by_itself(tmp_path, undrawn):
    points = [
        {"name": "ours", "kind": "ppo-lag", "mean_reward": 3.0, "mean_cost": -1.0},
        {"name": "a", "kind": "shaping", "nu": 0.01, "mean_reward": 3.1, "mean_cost": -0.9},
        {"name": "b", "kind": "shaping", "nu": 2.0, "mean_reward": 2.9, "mean_cost": -1.1},
    ]
    summary = {"models": [{"name": "SFT", "harmful_rate": 0.5}], "ablations": {"points": points}}
    assert captions(tmp_path, summary)[-1] == (
        "Of 2 fixed ν, none did at least as well as ours in both mean reward and mean cost, and none at most as well "
        "in both. One run per point."
    )
    points[1]["mean_cost"] = -1.0
    points[2]["mean_reward"] = 3.0
    assert "Of 2 fixed ν, 2 (ν = 0.01, 2) did at least as well" in captions(tmp_path, summary)[-1]
    points[1]["mean_reward"] = 2.0
    assert "1 (ν = 2) did" in captions(tmp_path, summary)[-1]
    assert "and 1 (ν = 0.01) at most as well in both" in captions(tmp_path, summary)[-1]


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ({"theft": 0.0, "arson": 0.0}, "fell in 2 of 2 categories and rose in none. No harmful answer was seen in any"),
        ({"theft": 0.9, "arson": 0.2}, "fell in 0 of 2 categories and rose in 1. The highest rate left is 90.0%"),
        ({"fraud": 0.9}, "No category was judged both before and after."),
    ],
)
def test_categories_said(tmp_path, undrawn, after, said):
    models = [
        {"name": "SFT", "harmful_rate": 0.5, "harmful_rate_by_category": {"theft": 0.8, "arson": 0.2}},
        {"name": "last", "harmful_rate": 0.1, "harmful_rate_by_category": after},
    ]
    assert said in captions(tmp_path, {"models": models})[-1]


def test_a_multiplier_without_a_constraint_logged(tmp_path, undrawn):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "lambda": 0.5}\n{"step": 2, "lambda": 0.75, "j_c": 1.0}\n')
    models = {"models": [{"name": "SFT", "harmful_rate": 0.5}]}
    assert captions(tmp_path, models, runs=[("r", path)])[-1] == "λ moved between 0.5 and 0.75 and ended at 0.75."


# Missing and bad.


def test_what_is_missing_is_shown_as_a_dash(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_report(tmp_path, {"models": [{"name": "SFT", "harmful_rate": 0.5}, {"name": "x", "harmful_rate": 0}]})
    found = Page((tmp_path / "index.html").read_text())
    assert found.rows[1:] == [["SFT", "50.0%", *"------"], ["x", "0.0%", *"------"]]
    assert len(found.sources()) == 1 and "dl" not in found.texts
    assert found.texts["p"][0] == ""
    assert found.texts["figcaption"] == [
        "x answers 0.0% of the held-out red-team prompts harmfully; SFT answered 50.0% so."
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "expected the metrics of a PPO-Lag run, found No such file"),
        ("", "expected steps with 'lambda', found 0 lines"),
        ('{"step": 1, "loss": 2.0}\n', "expected steps with 'lambda', found 1 lines"),
        ('{"step": 1, "lambda": null}\n', "expected steps with 'lambda', found 1 lines"),
        ('{"step": 1, "lambda": 1.0}\n{"step": 2, "lam', "line 2: expected a JSON object of metrics"),
        ("[1, 2]\n", "line 1: expected a JSON object of metrics, found '.1, 2.'"),
        ('{"lambda": "much"}\n', "line 1: expected a JSON object of metrics"),
        ('{"lambda": [1]}\n', "line 1: expected a JSON object of metrics"),
        (b"\xff\xfe\x00\x01", "line 1: expected a JSON object of metrics"),
    ],
)
def test_bad_metrics_files(tmp_path, undrawn, content, said):
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=said) as caught:
        write_report(tmp_path / "report", SUMMARY, [("round 1", path)])
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
