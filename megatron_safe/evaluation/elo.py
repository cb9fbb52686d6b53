"""Win rates, Elo and intervals: how models are compared, from per-prompt scores or from counts of wins.

Elo is the scale of the paper's Figure 5: a difference d means that the better model wins a comparison with probability
1 / (1 + 10^(-d / 400)).

The continuity rule. A model that wins all n comparisons (or none) has no finite Elo; its win rate is then taken as
(wins + 0.5) / (n + 1), as if one more comparison had been tied. Any other win rate is used as it is. The rule keeps
the order: it stays above the next lower rate, n - 1 wins and one tie.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np


def win_rate(a: Sequence[float], b: Sequence[float]) -> float:
    """Share of prompts on which model a's score beats model b's; a tie counts half.

    `a[i]` and `b[i]` are scores of the two answers to prompt i, higher is better. ValueError if the lengths differ,
    are zero, or a score is NaN.
    """
    scores_a, scores_b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if scores_a.shape != scores_b.shape or scores_a.ndim != 1 or not len(scores_a):
        raise ValueError(f"expected two equally long lists of scores, found shapes {scores_a.shape}, {scores_b.shape}")
    if np.isnan(scores_a).any() or np.isnan(scores_b).any():
        raise ValueError("a score is NaN")
    return float(np.mean((scores_a > scores_b) + 0.5 * (scores_a == scores_b)))


def elo_difference(p: float, n: int | None = None) -> float:
    """Elo of one model over another from its win rate p over n comparisons: 400 log10(p / (1 - p)).

    n is needed at p = 0 and p = 1 only, for the continuity rule above; ValueError if it is missing there.
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"expected a win rate between 0 and 1, found {p}")
    if p in (0.0, 1.0):
        if not n or n < 1:
            raise ValueError(f"a win rate of {p} has an Elo only with the number of comparisons")
        p = (p * n + 0.5) / (n + 1)
    return 400.0 * math.log10(p / (1.0 - p))


def bradley_terry_elo(win_matrix: Sequence[Sequence[float]], anchor: int = 0) -> list[float]:
    """Maximum-likelihood Elo of M models from all their comparisons, model `anchor` at 0.

    `win_matrix[i][j]` is how often model i beat model j (ties count 0.5 to both; the diagonal must be 0). The model is
    Bradley and Terry's, P(i beats j) = σ(θ_i - θ_j), fitted by Newton's method in float64; Elo = 400 θ / ln 10. With
    two models it equals `elo_difference`.

    If some group of models never lost to the rest, the likelihood has no maximum; then, and only then, the continuity
    rule is applied to every pair where one side won all. ValueError if the matrix is not square, has a negative or
    non-finite entry, or falls into groups that were never compared.
    """
    wins = np.array(win_matrix, dtype=np.float64)
    count = len(wins)
    if wins.shape != (count, count) or not np.isfinite(wins).all() or (wins < 0).any() or np.diagonal(wins).any():
        raise ValueError("expected a square matrix of finite counts >= 0 with a diagonal of 0")
    if not -count <= anchor < count:
        raise ValueError(f"expected an anchor among {count} models, found {anchor}")
    if not _all_reach_all(wins > 0):
        compared = wins + wins.T > 0
        if not _all_reach_all(compared):
            raise ValueError("some models were never compared with the others, not even through a third")
        one_sided = compared & ((wins == 0) | (wins.T == 0))
        wins = wins + 0.5 * one_sided
    free = np.arange(count) != anchor % count
    games, won = wins + wins.T, wins.sum(1)

    def log_likelihood(theta: np.ndarray) -> float:
        return float(-(wins * np.logaddexp(0.0, theta[None, :] - theta[:, None])).sum())

    theta = np.zeros(count)
    for _ in range(200):
        p = 0.5 * (1.0 + np.tanh(0.5 * (theta[:, None] - theta[None, :])))
        gradient = (won - (games * p).sum(1))[free]
        weights = games * p * (1.0 - p)
        information = (np.diag(weights.sum(1)) - weights)[np.ix_(free, free)]
        step = np.zeros(count)
        step[free] = np.linalg.solve(information, gradient)
        # The likelihood is concave, but a full Newton step from far away can overshoot.
        before = log_likelihood(theta)
        while log_likelihood(theta + step) < before - 1e-12 * abs(before):
            step *= 0.5
        theta += step
        if np.abs(step).max() < 1e-12:
            break
    return (400.0 / math.log(10.0) * theta).tolist()


def _all_reach_all(edges: np.ndarray) -> bool:
    """Whether every node of a directed graph, given as a square boolean matrix, has a path to every other."""
    reach = edges | np.eye(len(edges), dtype=bool)
    for _ in range(len(edges)):
        reach = reach @ reach
    return bool(reach.all())


def bootstrap_interval(
    statistic: Callable[..., float],
    *samples: Sequence,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile-bootstrap interval of `statistic(*samples)`, drawing prompts with replacement.

    Entry i of every sample belongs to prompt i, and a drawn prompt brings its entries in all of them, so comparisons
    stay paired: `bootstrap_interval(lambda a, b: elo_difference(win_rate(a, b), len(a)), scores, scores_of_sft)`.
    The same seed gives the same interval. ValueError if the samples are empty or differ in length.
    """
    arrays = [np.asarray(sample) for sample in samples]
    lengths = {len(array) for array in arrays}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(f"expected samples of one length above 0, found {sorted(lengths)}")
    (size,) = lengths
    generator = np.random.default_rng(seed)
    draws = (generator.integers(size, size=size) for _ in range(resamples))
    values = [statistic(*(array[draw] for array in arrays)) for draw in draws]
    low, high = np.quantile(values, [(1.0 - confidence) / 2.0, (1.0 + confidence) / 2.0])
    return float(low), float(high)


def wilson_interval(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a rate seen k times in n; unlike the normal one it is sensible at k = 0 and k = n."""
    if n < 1 or not 0 <= k <= n:
        raise ValueError(f"expected 0 <= k <= n and n >= 1, found k = {k}, n = {n}")
    z = NormalDist().inv_cdf((1.0 + confidence) / 2.0)
    rate = k / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    # At the ends the bound is exactly 0 or 1, which rounding would miss.
    return (0.0 if k == 0 else centre - half), (1.0 if k == n else centre + half)
