"""What the pictures of a report show."""

import math

import pytest
from made_up_report import BASE, SCORES, remember_figures
from matplotlib import image

from megatron_safe.evaluation import plots


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
    assert [ax.get_title(loc="left") for ax in axes[:4:2]] == [f"{BASE}, 3 answers", "round 2, 4 answers"]
    for ax, name in zip(axes[4::2], (BASE, "round 2"), strict=True):
        safe, harmful = ([tuple(xy) for xy in group.get_offsets()] for group in ax.collections)
        rows = list(zip(*(SCORES[name][key] for key in ("cost", "reward", "harmful")), strict=True))
        assert safe == [(cost, reward) for cost, reward, bad in rows if not bad]
        assert harmful == [(cost, reward) for cost, reward, bad in rows if bad]
    assert [sum(bar.get_height() for bar in ax.patches) for ax in axes[:4:2]] == [3, 4]
    assert [sum(bar.get_width() for bar in ax.patches) for ax in axes[5::2]] == [3, 4]  # rewards, at the side


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
