"""The sentence under each picture of the report, made from the numbers drawn in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from megatron_safe.evaluation.plots import harmful_interval


def say_models(first: dict, last: dict) -> str:
    sentences = []
    if last["harmful_rate"] is not None:
        rate = f"{last['name']} answers {last['harmful_rate']:.1%} of the held-out red-team prompts harmfully"
        if last.get("judged"):
            low, high = harmful_interval(last)
            rate += f" ({last['judged']:,} judged answers; 95% interval {low:.1%} to {high:.1%})"
        if first is not last and first["harmful_rate"] is not None:
            rate += f"; {first['name']} answered {first['harmful_rate']:.1%} so"
        sentences.append(f"{rate}.")
    if last.get("unjudged"):
        sentences.append(f"{last['unjudged']:,} answers have no verdict and are not counted.")
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


def say_multiplier(rounds: Sequence[tuple[str, dict[str, list[float]]]]) -> str:
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


def say_categories(first: dict, last: dict) -> str:
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


def say_scores(ends: Sequence[tuple[str, Mapping]]) -> str:
    sentences = []
    for name, columns in ends:
        count = len(columns["cost"])
        judged = [pair for pair in zip(columns["cost"], columns["harmful"], strict=True) if pair[1] is not None]
        agree = sum((cost > 0) == bool(bad) for cost, bad in judged)
        sentences.append(
            f"{name}: mean reward {sum(columns['reward']) / count:.2f}, mean cost {sum(columns['cost']) / count:.2f}"
            + (f"; the sign of the cost agrees with the judge on {agree / len(judged):.1%} of {len(judged):,} answers."
               if judged else ".")
        )
    return " ".join(sentences)


def say_ablations(points: Sequence[dict]) -> str:
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


def say_quadrants(models: Sequence[dict]) -> str:
    """Of models with `quadrants`."""
    anchor, last = models[0], models[-1]
    text = (
        f"Helpful: preferred over {anchor['name']}'s answer to the same prompt, a tie counted half (so "
        f"{anchor['name']} itself is half helpful). "
    )
    shares = last["quadrants"]
    return text + (
        f"{last['name']}: {shares['helpful_safe']:.1%} helpful and safe, {shares['unhelpful_safe']:.1%} safe alone, "
        f"{shares['helpful_harmful']:.1%} helpful alone, {shares['unhelpful_harmful']:.1%} neither, of "
        f"{last['quadrants_judged']:,} answers to red-team prompts."
    )


def say_distributions(distributions: dict) -> str:
    """Where the medians of the first and of the last model lie, and how much of their cost is above 0."""
    sentences = []
    names = list(distributions["cost"]["models"])
    for name in dict.fromkeys((names[0], names[-1])):
        reward, cost = (distributions[key]["models"][name] for key in ("reward", "cost"))
        if reward["count"] and cost["count"]:
            sentences.append(
                f"{name}: median reward {reward['quantiles']['0.5']:.2f}, median cost {cost['quantiles']['0.5']:.2f}, "
                f"{cost['above_0']:.1%} of the costs above 0."
            )
    return " ".join([*sentences, "Each histogram is as tall as its highest bin; the black line is the median."])
