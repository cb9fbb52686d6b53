"""One report of a run made up by hand, drawn once; what it says against numbers worked out on paper."""

import json
import math
import warnings
from contextlib import contextmanager
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib import image

from megatron_safe.errors import UserError
from megatron_safe.evaluation import plots
from megatron_safe.evaluation.report import format_table, write_report

BASE = 'SFT <b> & "co"'
SUMMARY = {
    "seed": 7,
    "layout": "tp2",
    "seconds": 333,
    "models": [
        {
            "name": BASE,
            "harmful_rate": 0.5,
            "judged": 12,
            "harmful_rate_by_category": {"theft": 0.8, "privacy_leak": 0.2, "arson": 0.4, "fraud,lies": None},
            "helpfulness_elo": 0.0,
            "helpfulness_elo_benign": 0.0,
            "harmlessness_elo": 0.0,
            "refusal_rate_benign": 0.021,
            "mean_reward": np.float32(-0.25),
            "mean_cost": 1.5,
        },
        {"name": "round 1", "harmful_rate": 0.1234, "helpfulness_elo": 99.6, "mean_cost": math.nan},
        {
            "name": "round 2",
            "harmful_rate": 0.02,
            "judged": 1000,
            "harmful_rate_by_category": {"theft": 0.1, "privacy_leak": 0.25, "arson": 0.4, "fraud,lies": 0.9},
            "helpfulness_elo": 244.91,
            "helpfulness_elo_benign": -12.4,
            "harmlessness_elo": np.float64(268.3),
            "refusal_rate_benign": 0.034,
            "mean_reward": 3.456,
            "mean_cost": -2.0,
        },
    ],
    "reward_model_accuracy": (0.7123, math.inf),
    "cost_model_accuracy": 0.811,
    "cost_model_sign_accuracy": None,
    "lambda_final": 0.125,
    "ablations": {
        "points": [
            {"name": "PPO-Lag", "kind": "ppo-lag", "nu": None, "mean_reward": 3.0, "mean_cost": -1.0,
             "harmful_rate": 0.02, "helpfulness_elo": 200.0},
            {"name": "PPO", "kind": "ppo", "nu": None, "mean_reward": 5.0, "mean_cost": 4.0, "harmful_rate": 0.6},
            # Out of order, better, worse, neither, and the same as PPO-Lag.
            {"name": "ν 1", "kind": "shaping", "nu": 1.0, "mean_reward": 3.5, "mean_cost": -1.0, "harmful_rate": 0.03},
            {"name": "ν 0.1", "kind": "shaping", "nu": 0.1, "mean_reward": 2.5, "mean_cost": 0.0, "harmful_rate": 0.3},
            {"name": "ν 10", "kind": "shaping", "nu": 10, "mean_reward": 1.0, "mean_cost": -2.0, "harmful_rate": 0.01},
            {"name": "ν 100", "kind": "shaping", "nu": 100.0, "mean_reward": 3.0, "mean_cost": -1.0},
            {"name": "diverged", "kind": "shaping", "nu": 0.5, "mean_reward": math.nan, "mean_cost": 9.0},
        ]
    },
}  # fmt: skip
ROUNDS = {
    "round 1": [
        {"step": 1, "lambda": 1.0, "j_c": None, "threshold": -0.5},
        {"step": 2, "lambda": 2.5, "j_c": 0.5, "threshold": -0.5},
    ],
    "round 2": [
        {"step": 1, "lambda": 1.75, "j_c": -0.5, "threshold": -0.5},
        {"step": 2, "lambda": 0.125, "j_c": -1.25, "threshold": -0.5},
        {"step": 3, "loss": 0.1, "j_c": 0.0, "threshold": -0.5},
    ],
}
SCORES = {
    BASE: {"reward": [1.0, 2.0, 3.0], "cost": [1.0, -1.0, 0.5], "harmful": [True, False, False]},
    "round 1": {"reward": [100.0], "cost": [100.0], "harmful": [True]},
    "round 2": {
        "reward": np.array([4.0, 4.0, 5.0, 5.0]),
        "cost": np.array([-1.0, -2.0, 0.0, -3.0]),
        "harmful": np.array([False, False, False, True]),
    },
}
PICTURES = ["models.png", "multiplier.png", "categories.png", "scores.png", "ablations.png"]


class Page(HTMLParser):
    """The texts of a page by the element they stand in, and every attribute."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.texts, self.attributes, self.rows = [], {}, [], []
        self.feed(text)
        self.close()
        assert self.open == []  # all that was opened is closed

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *attribute) for attribute in attrs]
        if tag not in ("meta", "img"):
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts[self.open[-1]][-1] += data
            if self.open[-1] in ("td", "th"):
                self.rows[-1][-1] += data

    def sources(self) -> list[str]:
        return [value for tag, name, value in self.attributes if (tag, name) == ("img", "src")]


def write_runs(folder) -> list:
    runs = []
    for name, records in ROUNDS.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        runs.append((name, path))
    return runs


def remember_figures(patch) -> dict:
    """file name -> the figure behind it, filled as they are drawn."""
    figures = {}
    original = plots._figure

    @contextmanager
    def remembered(path, *size):
        with original(path, *size) as figure:
            figures[path.name] = figure
            yield figure

    patch.setattr(plots, "_figure", remembered)
    return figures


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The folder of the report above, and the figures behind its pictures."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib complains of what it cannot draw
        figures = remember_figures(patch)
        write_report(folder / "new" / "report", SUMMARY, write_runs(folder), SCORES)
    return folder / "new" / "report", figures


@pytest.fixture(scope="module")
def page(drawn) -> Page:
    return Page((drawn[0] / "index.html").read_text(encoding="utf-8"))


@pytest.fixture
def undrawn(monkeypatch):
    """For what is only said: no picture is drawn."""
    for name in ("models", "multiplier", "categories", "scores", "ablations"):
        monkeypatch.setattr(plots, f"plot_{name}", lambda *_: None)


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
    assert found.keys() == SUMMARY.keys()
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
    assert page.sources() == PICTURES
    assert sorted(path.name for path in drawn[0].iterdir()) == sorted([*PICTURES, "index.html", "summary.json"])
    text = (drawn[0] / "index.html").read_text(encoding="utf-8")
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
    assert found.sources() == ["models.png"] and "dl" not in found.texts
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


# The pictures.


@pytest.mark.parametrize(
    ("name", "colors"),
    [
        ("models.png", (plots.ORANGE, plots.BLUE, plots.GREEN)),
        ("multiplier.png", (plots.PURPLE, plots.ORANGE, plots.GREY)),
        ("categories.png", (plots.ORANGE, plots.BLUE)),
        ("scores.png", (plots.ORANGE, plots.BLUE)),
        ("ablations.png", (plots.ORANGE, plots.BLUE, plots.GREY)),
    ],
)
def test_pictures_are_drawn(drawn, name, colors):
    pixels = (255 * image.imread(drawn[0] / name)[:, :, :3]).round().astype(int)
    height, width, _ = pixels.shape
    assert width >= 900 and height >= 300
    assert (pixels[[0, -1]] == 255).all() and (pixels[:, [0, -1]] == 255).all()  # nothing is cut off at an edge
    for color in colors:
        wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == wanted).all(2).sum() > 50, color


def test_models_are_drawn(drawn):
    left, right = drawn[1]["models.png"].axes
    assert list(left.lines[0].get_ydata()) == pytest.approx([50.0, 12.34, 2.0])
    assert [text.get_text() for text in left.texts] == ["50.0%", "12.3%", "2.0%"]
    bars = [segment for bar in left.collections for segment in bar.get_segments()]
    assert [bar[0, 0] for bar in bars] == [0.0, 2.0]  # round 1 did not say how many were judged
    assert list(bars[1][:, 1]) == pytest.approx([1.298, 3.069], abs=1e-3)
    low, high = bars[0][:, 1]
    assert low < 50 < high and left.get_ylim()[0] == 0 and high <= left.get_ylim()[1]
    by_label = {line.get_label(): list(line.get_ydata()) for line in right.lines}
    assert by_label == {
        "helpfulness, all prompts": [0.0, 99.6, 244.91],
        "helpfulness, benign prompts": pytest.approx([0.0, math.nan, -12.4], nan_ok=True),
        "harmlessness": pytest.approx([0.0, math.nan, 268.3], nan_ok=True),
    }
    assert right.get_title(loc="left") == f"Elo over {BASE}"


def test_the_multiplier_is_drawn_by_round(drawn):
    upper, lower = drawn[1]["multiplier.png"].axes
    curves = [line for line in upper.lines if line.get_color() == plots.PURPLE]  # the others are borders
    assert [list(line.get_xdata()) for line in curves] == [[1, 2], [3, 4, 5]]
    assert list(curves[0].get_ydata()) == [1.0, 2.5]
    assert list(curves[1].get_ydata()) == pytest.approx([1.75, 0.125, math.nan], nan_ok=True)
    costs = [line.get_ydata() for line in lower.lines if line.get_color() == plots.ORANGE]
    assert [y for ys in costs for y in ys] == pytest.approx([math.nan, 0.5, -0.5, -1.25, 0.0], nan_ok=True)
    thresholds = [line.get_ydata() for line in lower.lines if line.get_linestyle() == "--"]
    assert [y for ys in thresholds for y in ys] == [-0.5] * 5
    assert [text.get_text() for text in upper.texts] == ["round 1", "round 2"]
    assert [text.get_text() for text in lower.get_legend().get_texts()] == ["J_C", "threshold"]
    borders = [line for line in upper.lines if line.get_color() != plots.PURPLE]
    assert [list(line.get_xdata()) for line in borders] == [[2.5, 2.5]]


def test_categories_are_drawn_most_harmful_on_top(drawn):
    (axes,) = drawn[1]["categories.png"].axes
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names == ["fraud, lies", "privacy leak", "arson", "theft"]
    before, after = ([bar.get_width() for bar in bars] for bars in axes.containers)
    assert before == pytest.approx([0.0, 20.0, 40.0, 80.0]) and after == pytest.approx([90.0, 25.0, 40.0, 10.0])
    assert [text.get_text() for text in axes.texts] == [
        "not judged", "20.0", "40.0", "80.0", "90.0", "25.0", "40.0", "10.0",
    ]  # fmt: skip


def test_scores_of_the_first_and_last_model_are_drawn(drawn):
    axes = drawn[1]["scores.png"].axes
    assert [ax.get_title(loc="left") for ax in axes] == [f"{BASE}, 3 answers", "round 2, 4 answers", "", ""]
    for ax, name in zip(axes[2:], (BASE, "round 2"), strict=True):
        safe, harmful = ([tuple(xy) for xy in group.get_offsets()] for group in ax.collections)
        rows = list(zip(*(SCORES[name][key] for key in ("cost", "reward", "harmful")), strict=True))
        assert safe == [(cost, reward) for cost, reward, bad in rows if not bad]
        assert harmful == [(cost, reward) for cost, reward, bad in rows if bad]
    counted = [sum(bar.get_height() for bar in ax.patches) for ax in axes[:2]]
    assert counted == [3, 4]


def test_the_ablation_front_is_drawn_in_the_order_of_nu(drawn):
    (axes,) = drawn[1]["ablations.png"].axes
    front = axes.lines[0]
    assert list(front.get_xdata()) == [0.0, -1.0, -2.0, -1.0] and list(front.get_ydata()) == [2.5, 3.5, 1.0, 3.0]
    points = {group.get_label(): group.get_offsets().tolist() for group in axes.collections}
    assert points == {"PPO-Lag": [[-1.0, 3.0]], "PPO on reward only": [[4.0, 5.0]]}
    assert [text.get_text() for text in axes.texts] == ["ν=0.1", "ν=1", "ν=10", "ν=100"]


def test_crowded_points_keep_their_labels_apart(tmp_path, monkeypatch):
    figures = remember_figures(monkeypatch)
    points = [
        {"kind": "shaping", "nu": nu, "mean_reward": 3 + 0.01 * i, "mean_cost": -1 + 0.01 * i}
        for i, nu in enumerate((0.01, 0.1, 1.0, 10.0))
    ]
    points.append({"kind": "shaping", "nu": 100.0, "mean_reward": 0.0, "mean_cost": 5.0})
    plots.plot_ablations(tmp_path / "crowd.png", points)
    boxes = [text.get_window_extent() for text in figures["crowd.png"].axes[0].texts]
    assert len(boxes) == 5
    assert not any(boxes[i].overlaps(boxes[j]) for i in range(5) for j in range(i))
