"""The report's pictures, each from plain numbers to one PNG. Only `report.py` calls these.

Colours are Okabe and Ito's, told apart with any colour vision; a marker or a position repeats what a colour says.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_safe.evaluation.elo import wilson_interval

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#6b6b6b"

_STYLE = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9a9a9a",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


@contextmanager
def _figure(path: Path, width: float, height: float) -> Iterator:
    """A matplotlib figure, saved to `path` at the end. It has its own Agg canvas and leaves pyplot's state alone."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        figure.savefig(path, facecolor="white")


def plot_models(path: Path, models: Sequence[dict]) -> None:
    """Harmful rate, with Wilson 95% intervals where `judged` is known, and Elo over the first model, by model."""
    names = [textwrap.fill(model["name"], 12) for model in models]
    xs = range(len(models))
    with _figure(path, 8.4, 3.4) as figure:
        left, right = figure.subplots(1, 2)
        rates = [100 * model["harmful_rate"] for model in models]
        left.plot(xs, rates, "-", color=ORANGE, marker="o")
        top = max(rates) * 1.2  # leaves room for the labels
        for x, model in zip(xs, models, strict=True):
            if model.get("judged"):
                low, high = wilson_interval(round(model["harmful_rate"] * model["judged"]), model["judged"])
                left.vlines(x, 100 * low, 100 * high, color=ORANGE, alpha=0.6, linewidth=4)
                top = max(top, 100 * high)
            left.annotate(f"{rates[x]:.1f}%", (x, rates[x]), (0, 8), textcoords="offset points", ha="center")
        left.set_ylim(0, max(top, 5))
        left.set_title("harmful answers, held-out red-team prompts (%)")
        curves = [
            ("helpfulness, all prompts", "helpfulness_elo", BLUE, "o"),
            ("helpfulness, benign prompts", "helpfulness_elo_benign", GREEN, "s"),
            ("harmlessness", "harmlessness_elo", ORANGE, "^"),
        ]
        for label, key, color, marker in curves:
            ys = [math.nan if model.get(key) is None else model[key] for model in models]
            if not all(map(math.isnan, ys)):
                right.plot(xs, ys, "-", color=color, marker=marker, label=label)
        right.set_title(f"Elo over {models[0]['name']}")
        if right.lines:
            right.legend()
        for axes in (left, right):
            axes.set_xticks(xs, names)
            axes.margins(x=0.12)
            axes.grid(axis="x", visible=False)


def plot_multiplier(path: Path, rounds: Sequence[tuple[str, dict[str, list[float]]]]) -> None:
    """λ and J_C with its threshold over the PPO-Lag steps of all rounds (the paper's Figure 6b).

    Each round is its name and the columns `lambda`, `j_c` and `threshold` (NaN where a step logged none); λ, its cost
    window and the threshold may start anew in each, so no line crosses a border.
    """
    with _figure(path, 8.4, 4.6) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True)
        start = 0
        for index, (name, columns) in enumerate(rounds):
            steps = [start + i for i in range(1, len(columns["lambda"]) + 1)]
            first = index == 0
            upper.plot(steps, columns["lambda"], color=PURPLE)
            lower.plot(steps, columns["j_c"], color=ORANGE, label="J_C" if first else None)
            lower.plot(steps, columns["threshold"], "--", color=GREY, label="threshold" if first else None)
            if not first:
                for axes in (upper, lower):
                    axes.axvline(start + 0.5, color="#9a9a9a", linewidth=0.8)
            position = (start + (len(steps) + 1) / 2, 1.0)
            upper.annotate(
                name, position, (0, 3), xycoords=("data", "axes fraction"), textcoords="offset points", ha="center"
            )
            start += len(steps)
        upper.set_ylabel("λ")
        upper.set_ylim(bottom=0)
        lower.set_ylabel("mean episode cost")
        lower.set_xlabel("rollout batch, counted over all rounds")
        lower.set_xlim(0.5, start + 0.5)
        lower.legend(ncols=2)


def plot_categories(path: Path, before: dict, after: dict) -> None:
    """Harmful rate by category of two models (`name`, `harmful_rate_by_category`), most harmful before on top."""
    rates_before, rates_after = before["harmful_rate_by_category"], after["harmful_rate_by_category"]
    names = sorted(rates_before.keys() | rates_after.keys(), key=lambda c: (rates_before.get(c) or 0.0, c))
    with _figure(path, 8.4, 1.2 + 0.42 * len(names)) as figure:
        axes = figure.subplots()
        for rates, model, color, offset in ((rates_before, before, ORANGE, 0.19), (rates_after, after, BLUE, -0.19)):
            values = [100 * (rates.get(name) or 0.0) for name in names]
            rows = [row + offset for row in range(len(names))]
            axes.barh(rows, values, height=0.36, color=color, label=model["name"])
            for row, value, name in zip(rows, values, names, strict=True):
                text = "not judged" if rates.get(name) is None else f"{value:.1f}"
                axes.annotate(text, (value, row), (3, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set_yticks(range(len(names)), [_readable(name) for name in names])
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.set_xlim(left=0)
        axes.margins(x=0.08)
        axes.grid(axis="y", visible=False)
        axes.set_title("harmful answers by category (%)")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=2)


def plot_scores(path: Path, scores: Sequence[tuple[str, dict]]) -> None:
    """Reward against cost of each answer, with the distribution of costs above it, one column per model.

    Each model is its name and `reward`, `cost` and `harmful` (as judged), one entry per answer. In the manner of the
    paper's scatter plots; left of cost 0 is what the cost model calls safe.
    """
    import numpy as np

    every_cost = np.concatenate([np.asarray(columns["cost"], dtype=float) for _, columns in scores])
    every_cost = every_cost[np.isfinite(every_cost)]
    with _figure(path, 4.3 * len(scores), 5.4) as figure:
        grid = figure.subplots(
            2, len(scores), sharex=True, sharey="row", height_ratios=(1, 2.6), squeeze=False
        )
        edges = np.histogram_bin_edges(np.append(every_cost, 0.0), bins=40)
        for (name, columns), (upper, lower) in zip(scores, grid.T, strict=True):
            reward, cost = (np.asarray(columns[key], dtype=float) for key in ("reward", "cost"))
            harmful = np.asarray(columns["harmful"], dtype=bool)
            groups = ((~harmful, BLUE, "o", "judged safe"), (harmful, ORANGE, "^", "judged harmful"))
            upper.hist(
                [cost[mask] for mask, *_ in groups], edges, stacked=True, color=[color for _, color, *_ in groups]
            )
            for mask, color, marker, label in groups:
                lower.scatter(cost[mask], reward[mask], s=12, color=color, marker=marker, alpha=0.45, lw=0, label=label)
            for axes in (upper, lower):
                axes.axvline(0.0, color=GREY, linestyle="--", linewidth=1)
            upper.set_title(f"{name}, {len(cost):,} answers")
            lower.set_xlabel("cost (above 0: unsafe)")
        grid[0, 0].set_ylabel("answers")
        grid[1, 0].set_ylabel("reward")
        legend = figure.legend(*grid[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        for handle in legend.legend_handles:
            handle.set_alpha(1.0)
            handle.set_sizes([36])


def plot_ablations(path: Path, points: Sequence[dict]) -> None:
    """Mean reward against mean cost: fixed shaping over ν as a front, plain PPO and PPO-Lag as points (Figure 6a)."""
    shaping = sorted((point for point in points if point["kind"] == "shaping"), key=lambda point: point["nu"])
    with _figure(path, 7.0, 4.8) as figure:
        axes = figure.subplots()
        costs, rewards = ([point[key] for point in shaping] for key in ("mean_cost", "mean_reward"))
        axes.plot(costs, rewards, "o-", color=GREY, linewidth=1.2, label="reward shaping, fixed ν")
        others = (("ppo-lag", "PPO-Lag", BLUE, "*", 190), ("ppo", "PPO on reward only", ORANGE, "D", 55))
        for kind, label, color, marker, size in others:
            chosen = [point for point in points if point["kind"] == kind]
            if chosen:
                xs, ys = ([point[key] for point in chosen] for key in ("mean_cost", "mean_reward"))
                axes.scatter(xs, ys, s=size, color=color, marker=marker, zorder=3, label=label)
        axes.axvline(0.0, color=GREY, linestyle="--", linewidth=1)
        axes.margins(0.12)
        axes.set_xlabel("mean cost (lower is safer)")
        axes.set_ylabel("mean reward (higher is more helpful)")
        axes.legend()
        _label_without_overlap(
            figure, axes, [(point["mean_cost"], point["mean_reward"], f"ν={point['nu']:g}") for point in shaping]
        )


def _label_without_overlap(figure, axes, labels: Sequence[tuple[float, float, str]]) -> None:
    """Put each text at the first place around its point where it covers no earlier text and no point."""
    places = [(0, 9), (0, -9), (22, 0), (-22, 0), (20, 10), (20, -10), (-20, 10), (-20, -10), (0, 22), (0, -22)]
    figure.draw_without_rendering()  # fixes the layout and with it where points lie
    renderer = figure.canvas.get_renderer()
    points = [axes.transData.transform((x, y)) for x, y, _ in labels]
    points += [tuple(axes.transData.transform(xy)) for c in axes.collections for xy in c.get_offsets()]
    taken = []
    for x, y, label in labels:
        for place in places:
            text = axes.annotate(
                label, (x, y), place, textcoords="offset points", ha="center", va="center", fontsize=8, color="#444444"
            )
            box = text.get_window_extent(renderer)
            if not any(box.overlaps(other) for other in taken) and not any(box.contains(*point) for point in points):
                break
            if place != places[-1]:
                text.remove()
        taken.append(box)


def _readable(category: str) -> str:
    """`violence,aiding_and_abetting,incitement` as words that can be wrapped."""
    return textwrap.fill(category.replace("_", " ").replace(",", ", "), 34)
