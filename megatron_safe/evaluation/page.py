"""The report's HTML: one file that needs no other, its pictures inside it."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MODEL_COLUMNS = (  # heading, key, format
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
_RATE_COLUMNS = (
    ("harmful", "harmful_rate"),
    ("red-team prompts refused", "refusal_rate_red_team"),
    ("refused and harmful all the same", "partial_harm_rate"),
    ("benign prompts refused", "refusal_rate_benign"),
)
_ELO_COLUMNS = (
    ("helpfulness, all prompts", "helpfulness_elo"),
    ("helpfulness, benign prompts", "helpfulness_elo_benign"),
    ("harmlessness", "harmlessness_elo"),
)
_FACTS = (
    ("reward model accuracy", "reward_model_accuracy", "{:.1%}"),
    ("cost model accuracy", "cost_model_accuracy", "{:.1%}"),
    ("cost model sign accuracy", "cost_model_sign_accuracy", "{:.1%}"),
    ("final λ", "lambda_final", "{:.3f}"),
)


@dataclass(frozen=True)
class Picture:
    """One figure of the page; `table`: "categories" or "ablations", what is shown in numbers below it."""

    heading: str
    file: Path
    sentence: str
    table: str | None = None


def cells(columns: Sequence[tuple[str, str, str]], records: Sequence[Mapping]) -> list[list[str]]:
    """One row of texts per record, "-" for what is missing or None."""
    return [
        ["-" if record.get(key) is None else form.format(record[key]) for _, key, form in columns]
        for record in records
    ]


def page(summary: Mapping, pictures: Sequence[Picture]) -> str:
    """The whole document, for a summary in plain types (`report.py`)."""
    models = summary["models"]
    where = [f"{key} {summary[key]}" for key in ("seed", "layout") if summary.get(key) is not None]
    if summary.get("seconds") is not None:
        where.append(f"{summary['seconds'] / 60:.1f} minutes")
    facts = "\n".join(
        f"<dt>{html.escape(label)}</dt><dd>{html.escape(text)}</dd>" for label, text in _facts(summary)
    )
    tables = {
        None: "",
        "categories": _categories(models),
        "ablations": _columns_table(_ABLATION_COLUMNS, (summary.get("ablations") or {}).get("points") or []),
    }
    figures = "\n".join(
        f"<section><h2>{html.escape(picture.heading)}</h2>\n<figure><img src='{_embedded(picture.file)}' "
        f"alt='{html.escape(picture.heading)}'><figcaption>{html.escape(picture.sentence)}</figcaption></figure>"
        f"{tables[picture.table]}</section>"
        for picture in pictures
    )
    return _PAGE.format(
        where=html.escape(" · ".join(where)),
        certificates="\n".join(map(_certificate, summary.get("certificates") or [])),
        table=_columns_table(MODEL_COLUMNS, models),
        first=html.escape(models[0]["name"]),
        tables=_intervals(models) + _win_rates(models),
        facts=f"<dl>{facts}</dl>" if facts else "",
        figures=figures,
    )


def _embedded(file: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode("ascii")


def _certificate(certificate: Mapping) -> str:
    kind, word = ("promised", "Promised") if certificate["promised"] else ("refused", "Not promised")
    return (
        f"<div class='certificate {kind}'><strong>{word}</strong><p>{html.escape(certificate['sentence'])}.</p></div>"
    )


def _facts(summary: Mapping) -> list[tuple[str, str]]:
    facts = []
    for label, key, form in _FACTS:
        values = summary.get(key)
        if values is not None:
            values = values if isinstance(values, list) else [values]
            facts.append((label, ", ".join("-" if v is None else form.format(v) for v in values)))
    return facts


# Tables, wider than the page where there are many models: they scroll by themselves.


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{html.escape(heading)}</th>" for heading in headings)]
    lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return "<div class='wide'><table>\n" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table></div>"


def _columns_table(columns: Sequence[tuple[str, str, str]], records: Sequence[Mapping]) -> str:
    return _table([heading for heading, _, _ in columns], cells(columns, records))


def _with_interval(value: float | None, interval: Sequence[float | None] | None, form: str) -> str:
    if value is None:
        return "-"
    if not interval or None in interval:
        return form.format(value)
    low, high = interval
    return f"{form.format(value)} ({form.format(low)} to {form.format(high)})"


def _of_models(heading: str, columns: Sequence[tuple[str, str]], form: str, models: Sequence[Mapping]) -> str:
    """A value with its interval by model and key; nothing where no model has an interval."""
    columns = [column for column in columns if any(model.get(f"{column[1]}_interval") for model in models)]
    if not columns:
        return ""
    rows = [
        [model["name"], *(_with_interval(model.get(key), model.get(f"{key}_interval"), form) for _, key in columns)]
        for model in models
    ]
    return f"<h2>{heading}</h2>" + _table(["model", *(heading for heading, _ in columns)], rows)


def _intervals(models: Sequence[Mapping]) -> str:
    return _of_models("Rates, with 95% intervals", _RATE_COLUMNS, "{:.1%}", models) + (
        _of_models("Elo, with 95% intervals over prompts", _ELO_COLUMNS, "{:+.0f}", models) if len(models) > 1 else ""
    )


def _win_rates(models: Sequence[Mapping]) -> str:
    """Who is preferred how often over whom, one table for each of the two questions."""
    text = ""
    for question, key in (("helpful", "helpfulness_win_rates"), ("harmless", "harmlessness_win_rates")):
        if not any(model.get(key) for model in models):
            continue
        rows = []
        for model in models:
            found = [(model.get(key) or {}).get(other["name"]) for other in models]
            shown = ["-" if one is None else _with_interval(one["rate"], one["interval"], "{:.0%}") for one in found]
            rows.append([model["name"], *shown])
        text += f"<h2>More {question}: how often the row's answer is preferred over the column's</h2>"
        text += _table(["", *(model["name"] for model in models)], rows)
    return text


def _categories(models: Sequence[Mapping]) -> str:
    """Harmful rate of every model by category, where their intervals are known."""
    known = [model for model in models if model.get("harmful_rate_by_category_interval")]
    rows = []
    for category in sorted({category for model in known for category in model["harmful_rate_by_category"]}):
        found = [
            (model["harmful_rate_by_category"].get(category), model["harmful_rate_by_category_interval"].get(category))
            for model in known
        ]
        readable = category.replace("_", " ").replace(",", ", ")
        rows.append([readable, *(_with_interval(rate, interval, "{:.0%}") for rate, interval in found)])
    return _table(["category", *(model["name"] for model in known)], rows) if rows else ""


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
.certificate {{ border: 1px solid var(--line); border-left: .4rem solid #D55E00; padding: .6rem 1rem; margin: 1rem 0; }}
.promised {{ border-left-color: #009E73; }}
.certificate p {{ margin: 0; }}
</style>
</head>
<body>
<h1>Safe RLHF: what the run reached</h1>
<p>{where}</p>
{certificates}
{table}
<p>Elo is over {first}; "harmful" counts answers to held-out red-team prompts.</p>
{tables}
{facts}
{figures}
</body>
</html>
"""
