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
        and what else `summary.compare_models` says: intervals (KEY_interval), quadrants, win rates, refusals, leaks
    certificates                      list of `certificate.Certificate.to_dict`
    distributions                     `summary.score_distributions`, filled in where scores are given
    reward_model_accuracy, cost_model_accuracy, cost_model_sign_accuracy, lambda_final
                                      one number, or a list with one per round
    ablations                         {"points": [...]}, may be missing; each point has name, kind ('ppo-lag', 'ppo' or
                                      'shaping'), nu (shaping only), mean_reward, mean_cost, harmful_rate,
                                      helpfulness_elo

Anything but `name`, `harmful_rate` and a point's `kind` and `nu` may be missing, and anything but `name` None; it is
then shown as "-", or not at all. A point without mean reward or mean cost stands in the table alone. Each sentence
under a picture is made from the numbers drawn in it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_safe.errors import UserError
from megatron_safe.evaluation import captions, plots
from megatron_safe.evaluation.page import MODEL_COLUMNS, Picture, cells, page
from megatron_safe.evaluation.summary import score_distributions


def format_table(summary: Mapping) -> str:
    """The models as aligned text, one row each: harmful rate, Elo over the first model, refusals, reward and cost."""
    rows = [[heading for heading, _, _ in MODEL_COLUMNS], *cells(MODEL_COLUMNS, summary["models"])]
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
    """Write summary.json, index.html and its pictures (in the page, and as PNGs beside it) into `folder`.

    What an earlier report left there is written over. `runs`: (round name, metrics.jsonl) of the PPO-Lag rounds in
    order. `scores`: model name → `reward`, `cost` and `harmful` (None without a verdict), one entry per answer; each
    answer is drawn for the first and the last model, the distributions for all. NaN and infinities in the summary are
    written as null. UserError if a metrics file is missing, empty or not what MetricsLog writes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    summary = _plain({**summary, "distributions": score_distributions(scores)} if scores else summary)
    (folder / "summary.json").write_text(
        json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )
    models = summary["models"]
    first, last = models[0], models[-1]
    pictures = []

    def draw(heading: str, name: str, sentence: str, plot, *numbers, table: str | None = None) -> None:
        plot(folder / name, *numbers)
        pictures.append(Picture(heading, folder / name, sentence, table))

    draw("Harm and Elo by model", "models.png", captions.say_models(first, last), plots.plot_models, models)
    crossed = [model for model in models if model.get("quadrants")]
    if crossed:
        sentence = captions.say_quadrants(crossed)
        draw("Helpful and safe", "quadrants.png", sentence, plots.plot_quadrants, crossed)
    if runs:
        rounds = [(name, _read_columns(Path(path))) for name, path in runs]
        sentence = captions.say_multiplier(rounds)
        draw("The multiplier and the cost it answers to", "multiplier.png", sentence, plots.plot_multiplier, rounds)
    if len(models) > 1 and first.get("harmful_rate_by_category") and last.get("harmful_rate_by_category"):
        sentence = captions.say_categories(first, last)
        draw("Harm by category, before and after", "categories.png", sentence, plots.plot_categories, first, last,
             table="categories")  # fmt: skip
    ends = [(name, scores[name]) for name in dict.fromkeys((first["name"], last["name"])) if name in (scores or {})]
    if ends:
        draw("Reward and cost of each answer", "scores.png", captions.say_scores(ends), plots.plot_scores, ends)
    distributions = summary.get("distributions")
    if distributions:
        sentence = captions.say_distributions(distributions)
        draw("Reward and cost by model", "distributions.png", sentence, plots.plot_distributions, distributions)
    points = (summary.get("ablations") or {}).get("points") or []
    if points:
        drawn = [p for p in points if p.get("mean_reward") is not None and p.get("mean_cost") is not None]
        sentence = captions.say_ablations(drawn)
        draw("Ablations: reward against cost", "ablations.png", sentence, plots.plot_ablations, drawn,
             table="ablations")  # fmt: skip
    (folder / "index.html").write_text(page(summary, pictures), encoding="utf-8")


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
