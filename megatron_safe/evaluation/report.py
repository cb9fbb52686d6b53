"""What a run reached: a table for the terminal, and a folder with summary.json, index.html and pictures.

The summary is a plain dict, so that any program can make or read one:

    seed, layout, seconds             of the whole run
    models                            one dict per model, the starting point (SFT) first and the final model last:
        name
        harmful_rate                  share of held-out red-team prompts answered harmfully
        harmful_rate_by_category      {category: rate}
        judged                        how many answers stand behind `harmful_rate`
        helpfulness_elo, helpfulness_elo_benign, harmlessness_elo      over the first model
        refusal_rate_benign           share of benign prompts refused
        mean_reward, mean_cost        by the last reward and cost models
    reward_model_accuracy, cost_model_accuracy, cost_model_sign_accuracy, lambda_final
                                      one number, or a list with one per round
    ablations                         {"points": [...]}, may be missing; each point has name, kind ('ppo-lag', 'ppo' or
                                      'shaping'), nu (shaping only), mean_reward, mean_cost, harmful_rate,
                                      helpfulness_elo

Anything but `name`, `harmful_rate` and a point's `kind` and `nu` may be missing or None; it is then shown as "-". A
point without mean reward or mean cost stands in the table alone. Each sentence under a picture is made from the numbers
drawn in it.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_safe.errors import UserError
from megatron_safe.evaluation import plots
from megatron_safe.evaluation.elo import wilson_interval

_COLUMNS = (  # heading, key, format
    ("model", "name", "{}"),
    ("harmful", "harmful_rate", "{:.1%}"),
    ("Elo, all", "helpfulness_elo", "{:+.0f}"),
    ("Elo, benign", "helpfulness_elo_benign", "{:+.0f}"),
    ("harmlessness Elo", "harmlessness_elo", "{:+.0f}"),
    ("benign refused", "refusal_rate_benign", "{:.1%}"),
    ("mean reward", "mean_reward", "{:.2f}"),
    ("mean cost", "mean_cost", "{:.2f}"),
)
_ABLATION_COLUMNS = (
    ("run", "name", "{}"),
    ("ν", "nu", "{:g}"),
    ("mean reward", "mean_reward", "{:.2f}"),
    ("mean cost", "mean_cost", "{:.2f}"),
    ("harmful", "harmful_rate", "{:.1%}"),
    ("Elo, all", "helpfulness_elo", "{:+.0f}"),
)
_FACTS = (
    ("reward model accuracy", "reward_model_accuracy", "{:.1%}"),
    ("cost model accuracy", "cost_model_accuracy", "{:.1%}"),
    ("cost model sign accuracy", "cost_model_sign_accuracy", "{:.1%}"),
    ("final λ", "lambda_final", "{:.3f}"),
)


def format_table(summary: Mapping) -> str:
    """The models as aligned text, one row each: harmful rate, Elo over the first model, refusals, reward and cost."""
    rows = [[heading for heading, _, _ in _COLUMNS], *_cells(_COLUMNS, summary["models"])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *numbers in rows:
        aligned = [text.rjust(width) for text, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *aligned]))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def write_report(
    folder: Path,
    summary: Mapping,
    runs: Sequence[tuple[str, Path]] = (),
    scores: Mapping[str, Mapping[str, Sequence]] | None = None,
) -> None:
    """Write summary.json, index.html and its PNGs into `folder`, over what an earlier report left there.

    `runs`: (round name, metrics.jsonl) of the PPO-Lag rounds in order. `scores`: model name → `reward`, `cost` and
    `harmful`, one entry per answer; drawn for the first and the last model. NaN and infinities in the summary are
    written as null. UserError if a metrics file is missing, empty or not what MetricsLog writes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    summary = _plain(summary)
    (folder / "summary.json").write_text(
        json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )
    models = summary["models"]
    first, last = models[0], models[-1]
    pictures = [("Harm and Elo by round", "models.png", _say_models(first, last))]
    plots.plot_models(folder / "models.png", models)
    if runs:
        rounds = [(name, _read_columns(Path(path))) for name, path in runs]
        pictures.append(("The multiplier and the cost it answers to", "multiplier.png", _say_multiplier(rounds)))
        plots.plot_multiplier(folder / "multiplier.png", rounds)
    if len(models) > 1 and first.get("harmful_rate_by_category") and last.get("harmful_rate_by_category"):
        pictures.append(("Harm by category, before and after", "categories.png", _say_categories(first, last)))
        plots.plot_categories(folder / "categories.png", first, last)
    ends = [(name, scores[name]) for name in dict.fromkeys((first["name"], last["name"])) if name in (scores or {})]
    if ends:
        pictures.append(("Reward and cost of each answer", "scores.png", _say_scores(ends)))
        plots.plot_scores(folder / "scores.png", ends)
    points = (summary.get("ablations") or {}).get("points") or []
    if points:
        drawn = [p for p in points if p.get("mean_reward") is not None and p.get("mean_cost") is not None]
        pictures.append(("Ablations: reward against cost", "ablations.png", _say_ablations(drawn)))
        plots.plot_ablations(folder / "ablations.png", drawn)
    (folder / "index.html").write_text(_page(summary, pictures, points), encoding="utf-8")


def _plain(value):
    """The same value in JSON's own types: NumPy numbers become Python's, what is not finite becomes None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read_columns(path: Path) -> dict[str, list[float]]:
    """λ, J_C and the threshold by step from a PPO-Lag run's metrics.jsonl; NaN where a step has none."""
    keys = ("lambda", "j_c", "threshold")
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path}: expected the metrics of a PPO-Lag run, found {error.strerror}") from None
    columns: dict[str, list[float]] = {key: [] for key in keys}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            values = [math.nan if record.get(key) is None else float(record[key]) for key in keys]
        except (ValueError, TypeError, AttributeError):
            raise UserError(f"{path}, line {number}: expected a JSON object of metrics, found {line[:60]!r}") from None
        for key, value in zip(keys, values, strict=True):
            columns[key].append(value)
    if all(map(math.isnan, columns["lambda"])):
        raise UserError(f"{path}: expected steps with 'lambda', found {len(lines)} lines without it")
    return columns


# What each picture shows, said from its numbers.


def _say_models(first: dict, last: dict) -> str:
    rate = f"{last['name']} answers {last['harmful_rate']:.1%} of the held-out red-team prompts harmfully"
    if last.get("judged"):
        low, high = wilson_interval(round(last["harmful_rate"] * last["judged"]), last["judged"])
        rate += f" ({last['judged']:,} judged answers; 95% interval {low:.1%} to {high:.1%})"
    if first is last:
        sentences = [f"{rate}."]
    else:
        sentences = [f"{rate}; {first['name']} answered {first['harmful_rate']:.1%} so."]
    elos = [
        f"{last[key]:+.0f} {where}"
        for key, where in (("helpfulness_elo", "over all prompts"), ("helpfulness_elo_benign", "on benign ones"))
        if last.get(key) is not None
    ]
    if elos and first is not last:
        sentences.append(f"Its helpfulness Elo over {first['name']} is {' and '.join(elos)}.")
    if last.get("refusal_rate_benign") is not None:
        sentences.append(f"It refuses {last['refusal_rate_benign']:.1%} of the benign prompts.")
    return " ".join(sentences)


def _say_multiplier(rounds: Sequence[tuple[str, dict[str, list[float]]]]) -> str:
    lambdas = [x for _, columns in rounds for x in columns["lambda"] if not math.isnan(x)]
    pairs = [pair for _, columns in rounds for pair in zip(columns["j_c"], columns["threshold"], strict=True)]
    pairs = [pair for pair in pairs if not any(map(math.isnan, pair))]
    text = f"λ moved between {min(lambdas):.3g} and {max(lambdas):.3g} and ended at {lambdas[-1]:.3g}."
    if pairs:
        above = sum(j_c > threshold for j_c, threshold in pairs)
        text += (
            f" J_C was above its threshold in {above} of {len(pairs)} steps and ended at {pairs[-1][0]:.2f}"
            f" against {pairs[-1][1]:.2f}. λ grows while J_C is above the line and shrinks while it is below."
        )
    return text


def _say_categories(first: dict, last: dict) -> str:
    before, after = first["harmful_rate_by_category"], last["harmful_rate_by_category"]
    both = [name for name in after if after[name] is not None and before.get(name) is not None]
    if not both:
        return "No category was judged both before and after."
    fell, rose = sum(after[n] < before[n] for n in both), sum(after[n] > before[n] for n in both)
    text = f"From {first['name']} to {last['name']} the harmful rate fell in {fell} of {len(both)} categories"
    text += f" and rose in {rose}." if rose else " and rose in none."
    worst = max(both, key=lambda name: after[name])
    if after[worst] > 0:
        return f"{text} The highest rate left is {after[worst]:.1%}, in {worst}."
    return f"{text} No harmful answer was seen in any of them."


def _say_scores(ends: Sequence[tuple[str, Mapping]]) -> str:
    sentences = []
    for name, columns in ends:
        count = len(columns["cost"])
        agree = sum((cost > 0) == bool(bad) for cost, bad in zip(columns["cost"], columns["harmful"], strict=True))
        sentences.append(
            f"{name}: mean reward {sum(columns['reward']) / count:.2f}, mean cost {sum(columns['cost']) / count:.2f}; "
            f"the sign of the cost agrees with the judge on {agree / count:.1%} of {count:,} answers."
        )
    return " ".join(sentences)


def _say_ablations(points: Sequence[dict]) -> str:
    by_kind = {kind: [p for p in points if p["kind"] == kind] for kind in ("ppo-lag", "ppo", "shaping")}
    sentences = []
    for ours in by_kind["ppo-lag"]:
        if by_kind["shaping"]:
            better = [p["nu"] for p in by_kind["shaping"] if _dominates(p, ours)]
            worse = [p["nu"] for p in by_kind["shaping"] if _dominates(ours, p)]
            sentences.append(
                f"Of {len(by_kind['shaping'])} fixed ν, {_list_nus(better)} did at least as well as {ours['name']} in "
                f"both mean reward and mean cost, and {_list_nus(worse)} at most as well in both."
            )
        for plain in by_kind["ppo"]:
            if plain.get("harmful_rate") is not None and ours.get("harmful_rate") is not None:
                sentences.append(
                    f"{plain['name']} ends with {plain['harmful_rate']:.1%} harmful answers, "
                    f"{ours['name']} with {ours['harmful_rate']:.1%}."
                )
    rates = [p["harmful_rate"] for p in by_kind["shaping"] if p.get("harmful_rate") is not None]
    if rates:
        sentences.append(f"Over the fixed ν the harmful rate goes from {min(rates):.1%} to {max(rates):.1%}.")
    return " ".join(sentences + ["One run per point."])


def _dominates(a: dict, b: dict) -> bool:
    return a["mean_reward"] >= b["mean_reward"] and a["mean_cost"] <= b["mean_cost"]


def _list_nus(nus: Sequence[float]) -> str:
    return f"{len(nus)} (ν = {', '.join(f'{nu:g}' for nu in sorted(nus))})" if nus else "none"


# The page.


def _cells(columns: Sequence[tuple[str, str, str]], records: Sequence[Mapping]) -> list[list[str]]:
    return [
        ["-" if record.get(key) is None else form.format(record[key]) for _, key, form in columns]
        for record in records
    ]


def _table(columns: Sequence[tuple[str, str, str]], records: Sequence[Mapping]) -> str:
    lines = ["".join(f"<th>{html.escape(heading)}</th>" for heading, _, _ in columns)]
    lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in _cells(columns, records)]
    return "<table>\n" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table>"


def _facts(summary: Mapping) -> list[tuple[str, str]]:
    facts = []
    for label, key, form in _FACTS:
        values = summary.get(key)
        if values is not None:
            values = values if isinstance(values, list) else [values]
            facts.append((label, ", ".join("-" if v is None else form.format(v) for v in values)))
    return facts


def _page(summary: Mapping, pictures: Sequence[tuple[str, str, str]], points: Sequence[dict]) -> str:
    where = [f"{key} {summary[key]}" for key in ("seed", "layout") if summary.get(key) is not None]
    if summary.get("seconds") is not None:
        where.append(f"{summary['seconds'] / 60:.1f} minutes")
    facts = "\n".join(
        f"<dt>{html.escape(label)}</dt><dd>{html.escape(text)}</dd>" for label, text in _facts(summary)
    )
    figures = "\n".join(
        f"<section><h2>{html.escape(heading)}</h2>\n<figure><img src='{file}' alt='{html.escape(heading)}'>"
        f"<figcaption>{html.escape(sentence)}</figcaption></figure>"
        + (_table(_ABLATION_COLUMNS, points) if file == "ablations.png" else "")
        + "</section>"
        for heading, file, sentence in pictures
    )
    return _PAGE.format(
        where=html.escape(" · ".join(where)),
        table=_table(_COLUMNS, summary["models"]),
        first=html.escape(summary["models"][0]["name"]),
        facts=f"<dl>{facts}</dl>" if facts else "",
        figures=figures,
    )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Safe RLHF: what the run reached</title>
<style>
:root {{ --text: #1c1c1c; --soft: #5c5c5c; --line: #dcdcdc; --ground: #fff; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --text: #e8e8e8; --soft: #a8a8a8; --line: #3c3c3c; --ground: #161616; }}
}}
body {{ max-width: 56rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif;
  color: var(--text); background: var(--ground); }}
h1 {{ font-size: 1.5rem; margin-bottom: 0; }}
h2 {{ font-size: 1.1rem; margin-top: 2.5rem; }}
p, figcaption, dt {{ color: var(--soft); }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .35rem .8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }}
th {{ font-weight: 600; font-size: .85rem; vertical-align: bottom; white-space: normal; }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .9rem; }}
dd {{ margin: 0; font-variant-numeric: tabular-nums; }}
figure {{ margin: 0; }}
img {{ max-width: 100%; background: #fff; border-radius: 6px; }}
figcaption {{ margin: .5rem 0 1rem; }}
</style>
</head>
<body>
<h1>Safe RLHF: what the run reached</h1>
<p>{where}</p>
<div class="wide">
{table}
</div>
<p>Elo is over {first}; "harmful" counts answers to held-out red-team prompts.</p>
{facts}
{figures}
</body>
</html>
"""
