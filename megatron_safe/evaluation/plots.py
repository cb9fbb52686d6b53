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
    """Harmful rate and Elo over the first model, by model, each with its 95% interval where it is known."""
    xs = range(len(models))
    few = len(models) <= 4
    with _figure(path, 8.4, 3.4 if few else 6.4) as figure:
        left, right = figure.subplots(*(1, 2) if few else (2, 1))
        rates = [math.nan if model["harmful_rate"] is None else 100 * model["harmful_rate"] for model in models]
        left.plot(xs, rates, "-", color=ORANGE, marker="o")
        top = max((1.2 * rate for rate in rates if not math.isnan(rate)), default=5)  # leaves room for the labels
        for x, model in zip(xs, models, strict=True):
            if math.isnan(rates[x]):
                continue
            end = rates[x]
            if interval := harmful_interval(model):
                low, end = 100 * interval[0], 100 * interval[1]
                left.vlines(x, low, end, color=ORANGE, alpha=0.6, linewidth=4)
            top = max(top, 1.12 * end)
            left.annotate(f"{rates[x]:.1f}%", (x, end), (0, 6), textcoords="offset points", ha="center")
        left.set_ylim(0, max(top, 5))
        left.set_title("harmful answers, held-out red-team prompts (%)")
        curves = [
            ("helpfulness, all prompts", "helpfulness_elo", BLUE, "o", 0.0),
            ("helpfulness, benign prompts", "helpfulness_elo_benign", GREEN, "s", 0.07),
            ("harmlessness", "harmlessness_elo", ORANGE, "^", -0.07),
        ]
        for label, key, color, marker, offset in curves:
            ys = [math.nan if model.get(key) is None else model[key] for model in models]
            if all(map(math.isnan, ys)):
                continue
            places = [x + offset for x in xs]  # beside each other, so that their intervals are told apart
            right.plot(places, ys, "-", color=color, marker=marker, label=label)
            for x, model in zip(places, models, strict=True):
                low, high = model.get(f"{key}_interval") or (math.nan, math.nan)
                right.vlines(x, low, high, color=color, alpha=0.6, linewidth=3)
        right.set_title(f"Elo over {models[0]['name']}")
        if right.lines:
            right.legend()
        for axes in (left, right):
            axes.set_xticks(xs, [textwrap.fill(model["name"], 12) for model in models])
            if len(models) > 9:
                axes.tick_params("x", rotation=60, labelsize=8)
            axes.margins(x=0.12 if few else 0.08)
            axes.grid(axis="x", visible=False)


def harmful_interval(model: dict) -> Sequence[float] | None:
    """The harmful rate's 95% interval as the summary has it, or else from how many answers were judged."""
    if model.get("harmful_rate_interval") or model["harmful_rate"] is None or not model.get("judged"):
        return model.get("harmful_rate_interval")
    return wilson_interval(round(model["harmful_rate"] * model["judged"]), model["judged"])


def plot_quadrants(path: Path, models: Sequence[dict]) -> None:
    """Shares of helpful and safe answers to red-team prompts (`quadrants` of the summary), one bar per model."""
    parts = (
        ("helpful_safe", "helpful, safe", BLUE, "white"),
        ("unhelpful_safe", "unhelpful, safe", "#a6cee3", "black"),
        ("unhelpful_harmful", "unhelpful, harmful", "#f5c39b", "black"),
        ("helpful_harmful", "helpful, harmful", ORANGE, "white"),
    )
    with _figure(path, 8.4, 1.4 + 0.42 * len(models)) as figure:
        axes = figure.subplots()
        rows = list(range(len(models)))[::-1]  # the first on top
        starts = [0.0] * len(models)
        for key, label, color, ink in parts:
            shares = [100 * model["quadrants"][key] for model in models]
            axes.barh(rows, shares, left=starts, height=0.7, color=color, edgecolor="white", label=label)
            for row, start, share in zip(rows, starts, shares, strict=True):
                if share >= 4:  # narrower ones have no room
                    axes.text(start + share / 2, row, f"{share:.0f}", color=ink, ha="center", va="center", fontsize=8.5)
            starts = [start + share for start, share in zip(starts, shares, strict=True)]
        axes.set_yticks(rows, [textwrap.fill(model["name"], 24) for model in models])
        axes.set_ylim(-0.6, len(models) - 0.4)
        axes.set_xlim(0, 100)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("share of the answers to red-team prompts (%)")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4)


def plot_distributions(path: Path, distributions: dict) -> None:
    """Histograms of reward and of cost (`distributions` of the summary), one row per model, medians marked."""
    names = list(distributions["cost"]["models"])
    with _figure(path, 8.4, 1.3 + 0.62 * len(names)) as figure:
        for key, axes in zip(("reward", "cost"), figure.subplots(1, 2, sharey=True), strict=True):
            edges = distributions[key]["edges"]
            width = edges[1] - edges[0]
            colors = [GREEN if key == "reward" else BLUE if low < 0 else ORANGE for low in edges[:-1]]
            for row, found in enumerate(reversed(distributions[key]["models"].values())):
                tallest = max(found["histogram"])
                heights = [0.85 * count / max(1, tallest) for count in found["histogram"]]
                axes.bar(edges[:-1], heights, width, bottom=row, align="edge", color=colors, alpha=0.75)
                axes.axhline(row, color="#9a9a9a", linewidth=0.6)
                if found["quantiles"]:
                    axes.vlines(found["quantiles"]["0.5"], row, row + 0.85, color="black", linewidth=1.4)
            axes.set_yticks(range(len(names)), [textwrap.fill(name, 20) for name in reversed(names)])
            axes.set_ylim(-0.1, len(names))
            axes.grid(axis="y", visible=False)
            axes.set_xlabel("reward" if key == "reward" else "cost (above 0: unsafe)")
        axes.axvline(0.0, color=GREY, linestyle="--", linewidth=1)


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
    """Harmful rate by category of two models (`name`, `harmful_rate_by_category`), most harmful before on top.

    Whiskers are 95% intervals, where `harmful_rate_by_category_interval` has them.
    """
    rates_before, rates_after = before["harmful_rate_by_category"], after["harmful_rate_by_category"]
    names = sorted(rates_before.keys() | rates_after.keys(), key=lambda c: (rates_before.get(c) or 0.0, c))
    with _figure(path, 8.4, 1.2 + 0.42 * len(names)) as figure:
        axes = figure.subplots()
        for rates, model, color, offset in ((rates_before, before, ORANGE, 0.19), (rates_after, after, BLUE, -0.19)):
            values = [100 * (rates.get(name) or 0.0) for name in names]
            rows = [row + offset for row in range(len(names))]
            axes.barh(rows, values, height=0.36, color=color, label=model["name"])
            intervals = model.get("harmful_rate_by_category_interval") or {}
            for row, value, name in zip(rows, values, names, strict=True):
                low, high = intervals.get(name) or (math.nan, math.nan)
                axes.hlines(row, 100 * low, 100 * high, color="black", alpha=0.55, linewidth=1.3)
                text = "not judged" if rates.get(name) is None else f"{value:.1f}"
                end = value if math.isnan(high) else max(value, 100 * high)
                axes.annotate(text, (end, row), (3, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set_yticks(range(len(names)), [_readable(name) for name in names])
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.set_xlim(left=0)
        axes.margins(x=0.12)
        axes.grid(axis="y", visible=False)
        axes.set_title("harmful answers by category (%)")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=2)


def plot_scores(path: Path, scores: Sequence[tuple[str, dict]]) -> None:
    """Reward against cost of each answer, with the distributions of both at the edges, one column per model.

    Each model is its name and `reward`, `cost` and `harmful` (as judged; None where it was not), one entry per answer.
    In the manner of the paper's scatter plots; left of cost 0 is what the cost model calls safe.
    """
    import numpy as np

    def edges_of(key: str):
        every = np.concatenate([np.asarray(columns[key], dtype=float) for _, columns in scores])
        return np.histogram_bin_edges(np.append(every[np.isfinite(every)], 0.0 if key == "cost" else []), bins=40)

    edges = {key: edges_of(key) for key in ("reward", "cost")}
    with _figure(path, 4.4 * len(scores), 5.4) as figure:
        grid = figure.subplots(
            2, 2 * len(scores), sharex="col", sharey="row", squeeze=False,
            height_ratios=(1, 2.6), width_ratios=(2.6, 0.8) * len(scores),
        )  # fmt: skip
        for column, (name, columns) in enumerate(scores):
            (upper, corner), (lower, side) = grid[:, 2 * column : 2 * column + 2]
            reward, cost = (np.asarray(columns[key], dtype=float) for key in ("reward", "cost"))
            harmful = np.array([bool(bad) for bad in columns["harmful"]])
            judged = np.array([bad is not None for bad in columns["harmful"]])
            groups = [(judged & ~harmful, BLUE, "o", "judged safe"), (judged & harmful, ORANGE, "^", "judged harmful")]
            if not judged.all():
                groups.append((~judged, GREY, "x", "no verdict"))
            for axes, values, key, orientation in (
                (upper, cost, "cost", "vertical"), (side, reward, "reward", "horizontal"),
            ):  # fmt: skip
                axes.hist([values[mask] for mask, *_ in groups], edges[key], stacked=True, orientation=orientation,
                          color=[color for _, color, *_ in groups])  # fmt: skip
            for mask, color, marker, label in groups:
                lower.scatter(cost[mask], reward[mask], s=12, color=color, marker=marker, alpha=0.45,
                              lw=0.8 if marker == "x" else 0, label=label)  # fmt: skip
            for axes in (upper, lower):
                axes.axvline(0.0, color=GREY, linestyle="--", linewidth=1)
            corner.set_axis_off()
            side.tick_params(labelbottom=False)
            upper.set_title(f"{name}, {len(cost):,} answers")
            lower.set_xlabel("cost (above 0: unsafe)")
        grid[0, 0].set_ylabel("answers")
        grid[1, 0].set_ylabel("reward")
        entries = {
            label: handle
            for axes in grid[1, ::2]
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        legend = figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=3)
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
