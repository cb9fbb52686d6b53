"""Wins, Elo and intervals: how models are compared, from per-prompt scores or from counts of wins.

Elo is the scale of the paper's Figure 5: a difference d means that the better model wins a comparison with probability
1 / (1 + 10^(-d / 400)).

The continuity rule. A model that wins all n comparisons (or none) has no finite Elo; its win rate is then taken as
(wins + 0.5) / (n + 1), as if one more comparison had been tied. Any other win rate is used as it is. The rule keeps
the order: it stays above the next lower rate, n - 1 wins and one tie.

Legend: P prompts, M models, R resamples of the prompts.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np


def wins_by_prompt(scores: Sequence[Sequence[float | None]]) -> np.ndarray:
    """Who beats whom on each prompt: `wins_PMM[p, i, j]` is 1 where model i's score is above model j's, 0.5 in a tie.

    It is 0 where i loses, on the diagonal, and both ways where either score is None: that prompt compares no pair.

    Args:
        scores: model i's scores, one per prompt and the same prompts for all; higher is better.

    Raises:
        ValueError: the lengths differ or are zero, or a score is NaN.
    """
    lengths = {len(row) for row in scores}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(f"expected equally long lists of scores, found lengths {sorted(lengths)}")
    if any(score is not None and math.isnan(score) for row in scores for score in row):
        raise ValueError("a score is NaN")
    scores_PM = np.array([[math.nan if score is None else score for score in row] for row in scores], dtype=float).T
    first, second = scores_PM[:, :, None], scores_PM[:, None, :]
    wins_PMM = (first > second) + 0.5 * (first == second)
    wins_PMM[:, range(len(scores)), range(len(scores))] = 0.0
    return wins_PMM


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
    elos = _fit(wins[None], anchor)[0]
    if np.isnan(elos).any():
        raise ValueError("some models were never compared with the others, not even through a third")
    return elos.tolist()


def _fit(wins_RMM: np.ndarray, anchor: int) -> np.ndarray:
    """`bradley_terry_elo` of each of R checked matrices, (R, M); NaN where some models were never compared."""
    count = wins_RMM.shape[-1]
    compared_RMM = wins_RMM + wins_RMM.transpose(0, 2, 1) > 0
    one_sided_RMM = compared_RMM & ((wins_RMM == 0) | (wins_RMM.transpose(0, 2, 1) == 0))
    unbounded_R = ~_all_reach_all(wins_RMM > 0)
    wins_RMM = wins_RMM + 0.5 * (one_sided_RMM & unbounded_R[:, None, None])
    connected_R = _all_reach_all(compared_RMM)
    elos_RM = np.full(wins_RMM.shape[:2], math.nan)
    elos_RM[connected_R] = 400.0 / math.log(10.0) * _log_strengths(wins_RMM[connected_R], anchor % count)
    return elos_RM


def _log_strengths(wins_RMM: np.ndarray, anchor: int) -> np.ndarray:
    """θ of each matrix where the likelihood has a maximum, (R, M), 0 at the anchor."""
    count = wins_RMM.shape[-1]
    free = np.arange(count) != anchor
    games_RMM, won_RM = wins_RMM + wins_RMM.transpose(0, 2, 1), wins_RMM.sum(2)

    def log_likelihood(theta_RM: np.ndarray) -> np.ndarray:
        return -(wins_RMM * np.logaddexp(0.0, theta_RM[:, None, :] - theta_RM[:, :, None])).sum((1, 2))

    theta_RM = np.zeros(wins_RMM.shape[:2])
    for _ in range(200):
        p_RMM = 0.5 * (1.0 + np.tanh(0.5 * (theta_RM[:, :, None] - theta_RM[:, None, :])))
        gradient_RM = won_RM - (games_RMM * p_RMM).sum(2)
        weights_RMM = games_RMM * p_RMM * (1.0 - p_RMM)
        information_RMM = np.eye(count) * weights_RMM.sum(2)[:, :, None] - weights_RMM
        step_RM = np.zeros_like(theta_RM)
        step_RM[:, free] = np.linalg.solve(information_RMM[:, free][:, :, free], gradient_RM[:, free, None])[..., 0]
        # The likelihood is concave, but a full Newton step from far away can overshoot.
        before_R = log_likelihood(theta_RM)
        least_R = before_R - 1e-12 * np.abs(before_R)
        while (worse_R := log_likelihood(theta_RM + step_RM) < least_R).any():
            step_RM[worse_R] *= 0.5
        theta_RM += step_RM
        if not step_RM.size or np.abs(step_RM).max() < 1e-12:
            break
    return theta_RM


def _all_reach_all(edges_RMM: np.ndarray) -> np.ndarray:
    """Whether every node of each directed graph, given as boolean matrices, has a path to every other, (R,)."""
    count = edges_RMM.shape[-1]
    reach_RMM = edges_RMM | np.eye(count, dtype=bool)
    for _ in range(count.bit_length()):  # each squaring doubles the paths' length
        reach_RMM = reach_RMM.astype(float) @ reach_RMM.astype(float) > 0
    return reach_RMM.all((1, 2))


def elo_interval(wins_PMM: np.ndarray, anchor: int = 0, **bootstrap) -> tuple[np.ndarray, np.ndarray]:
    """Bootstrap interval of `bradley_terry_elo` of the summed wins, over prompts: lower and upper ends, (M,) each.

    Args:
        wins_PMM: row p is what prompt p brings, as from `wins_by_prompt`.
        bootstrap: resamples, confidence and seed of `bootstrap_interval`.
    """
    return bootstrap_interval(lambda wins_RMM: _fit(wins_RMM, anchor), wins_PMM, **bootstrap)


def bootstrap_interval(
    statistic: Callable[[np.ndarray], np.ndarray],
    sample: Sequence | np.ndarray,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile-bootstrap interval of a statistic of sums over prompts, drawing prompts with replacement.

    A drawn prompt brings its whole row of the sample, so comparisons stay paired. The same seed draws the same prompts.

    Args:
        statistic: from the sums over the drawn prompts, one row per resample (R, ...), to its values (R, ...); NaN
            where a resample has none, which is left out.
        sample: (P, ...), what each prompt brings. P prompts are drawn each time.

    Returns:
        the lower and the upper ends, shaped as one value of the statistic; NaN where no resample has a value.

    Raises:
        ValueError: no prompts.
    """
    rows = np.asarray(sample, dtype=np.float64)
    if not rows.ndim or not len(rows):
        raise ValueError("expected a sample of at least one prompt, found none")
    size = len(rows)
    generator = np.random.default_rng(seed)
    at_once = max(1, 4_000_000 // size)  # bounds the memory
    sums = []
    for start in range(0, resamples, at_once):
        count = min(at_once, resamples - start)
        draws = generator.integers(size, size=(count, size)) + size * np.arange(count)[:, None]
        counts = np.bincount(draws.ravel(), minlength=count * size).reshape(count, size)
        sums.append(counts.astype(np.float64) @ rows.reshape(size, -1))
    values = np.asarray(statistic(np.concatenate(sums).reshape(resamples, *rows.shape[1:])))
    ends = [(1.0 - confidence) / 2.0, (1.0 + confidence) / 2.0]
    if not np.isnan(values).any():
        low, high = np.quantile(values, ends, axis=0)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of all-NaN columns, whose ends are NaN
            low, high = np.nanquantile(values, ends, axis=0)
    return low, high


def wilson_interval(k: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a rate seen k times in n; unlike the normal one it is sensible at k = 0 and k = n."""
    if n < 1 or not 0 <= k <= n:
        raise ValueError(f"expected 0 <= k <= n and n >= 1, found k = {k}, n = {n}")
    z = NormalDist().inv_cdf((1.0 + confidence) / 2.0)
    rate = k / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    # At the ends the bound is exactly 0 or 1, which rounding would miss.
    return (0.0 if k == 0 else centre - half), (1.0 if k == n else centre + half)


def rate_interval(outcomes: Sequence[bool], prompts: Sequence, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of the share of true outcomes, wider where several of them answer one prompt.

    Answers to one prompt are alike, so they count for fewer than they are: for n / d, where d is how many times larger
    the rate's variance is than that of n independent answers (Rao and Scott, 1992). Where no variance is seen (a rate
    of 0 or 1) a prompt counts once.

    Args:
        prompts: hashable; outcome i is of an answer to prompts[i].
    """
    n, k = len(outcomes), sum(outcomes)
    trues_and_counts: dict = {}
    for outcome, prompt in zip(outcomes, prompts, strict=True):
        trues, count = trues_and_counts.get(prompt, (0, 0))
        trues_and_counts[prompt] = trues + outcome, count + 1
    m = len(trues_and_counts)
    if m == n:
        return wilson_interval(k, n, confidence)
    effect = n / m
    if m > 1 and 0 < k < n:
        rate = k / n
        squares = sum((trues - rate * count) ** 2 for trues, count in trues_and_counts.values())
        effect = max(1.0, m / (m - 1) * squares / (n * rate * (1 - rate)))
    return wilson_interval(k / effect, n / effect, confidence)
