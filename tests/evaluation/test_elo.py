import math
import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_safe.evaluation.elo import (
    bootstrap_interval,
    bradley_terry_elo,
    elo_difference,
    elo_interval,
    wins_by_prompt,
)


@st.composite
def beaten_matrices(draw, least: int = 1):
    """Wins of 2 to 5 models, each at least `least` times over each other; halves are ties."""
    count = draw(st.integers(2, 5))
    wins = st.integers(2 * least, 40).map(lambda halves: halves / 2)
    return [[0.0 if i == j else draw(wins) for j in range(count)] for i in range(count)]


def transposed(matrix):
    return [list(column) for column in zip(*matrix, strict=True)]


def zermelo_elo(wins, anchor):
    """Bradley-Terry strengths by Zermelo's fixed point s_i = W_i / Σ_j n_ij / (s_i + s_j), one model after another."""
    count = len(wins)
    strengths = [1.0] * count
    for _ in range(20_000):
        before = list(strengths)
        for i in range(count):
            games = ((j, wins[i][j] + wins[j][i]) for j in range(count) if j != i)
            strengths[i] = sum(wins[i]) / sum(n / (strengths[i] + strengths[j]) for j, n in games)
        mean = math.exp(sum(map(math.log, strengths)) / count)
        strengths = [strength / mean for strength in strengths]
        if max(abs(new / old - 1) for new, old in zip(strengths, before, strict=True)) < 1e-14:
            break
    return [400 * math.log10(strength / strengths[anchor]) for strength in strengths]


def expected_wins(wins, elos):
    """Each model's wins over all its games; at the maximum of the likelihood they are those it had."""
    models = range(len(wins))
    return [
        sum((wins[i][j] + wins[j][i]) / (1 + 10 ** ((elos[j] - elos[i]) / 400)) for j in models if j != i)
        for i in models
    ]


# Wins.


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.data())
def test_wins_by_prompt_equal_the_loop(models, prompts, data):
    score = st.none() | st.integers(-2, 2) | st.sampled_from([math.inf, -math.inf])
    scores = [[data.draw(score) for _ in range(prompts)] for _ in range(models)]
    wins_PMM = wins_by_prompt(scores)
    assert wins_PMM.shape == (prompts, models, models)
    for p in range(prompts):
        for i in range(models):
            for j in range(models):
                a, b = scores[i][p], scores[j][p]
                met = i != j and a is not None and b is not None
                assert wins_PMM[p, i, j] == (met and (1.0 if a > b else 0.5 if a == b else 0.0))


@pytest.mark.parametrize(
    ("scores", "said"),
    [([[1.0], [1.0, 2.0]], "equally long"), ([[], []], "equally long"), ([], "equally long"),
     ([[1.0, math.nan], [1.0, 1.0]], "NaN"), ([[1.0], [math.nan]], "NaN")],
)  # fmt: skip
def test_wins_by_prompt_refuse(scores, said):
    with pytest.raises(ValueError, match=said):
        wins_by_prompt(scores)


# Elo of two.


@pytest.mark.parametrize(
    ("p", "elo"), [(0.5, 0.0), (10 / 11, 400.0), (1 / 101, -800.0), (0.75, 190.848502), (0.64, 99.951), (0.8, 240.824)]
)
def test_known_elo_differences(p, elo):
    assert elo_difference(p) == pytest.approx(elo, abs=1e-3)


@settings(deadline=None)
@given(st.floats(1e-6, 1 - 1e-6), st.floats(1e-6, 1 - 1e-6))
def test_elo_difference_laws(p, q):
    assert 1 / (1 + 10 ** (-elo_difference(p) / 400)) == pytest.approx(p, rel=1e-9)
    assert elo_difference(1 - p) == pytest.approx(-elo_difference(p), abs=1e-7)
    assert (elo_difference(p) < elo_difference(q)) == (p < q) or math.isclose(p, q, rel_tol=1e-12)


@settings(deadline=None)
@given(st.integers(1, 10_000))
def test_the_continuity_rule_adds_one_tie_and_keeps_the_order(n):
    everything = elo_difference(1.0, n)
    assert everything == pytest.approx(elo_difference((n + 0.5) / (n + 1)))
    assert elo_difference(0.0, n) == pytest.approx(-everything)
    assert elo_difference((n - 0.5) / n) < everything < elo_difference(1.0, n + 1)
    # Any other rate is used as it is.
    assert elo_difference(0.75, n) == elo_difference(0.75)


@pytest.mark.parametrize(
    ("p", "n", "said"),
    [(1.0, None, "number of comparisons"), (0.0, 0, "number of comparisons"), (1.0, -3, "number of comparisons"),
     (1.5, 9, "between 0 and 1"), (-0.1, 9, "between 0 and 1"), (math.nan, 9, "between 0 and 1")],
)  # fmt: skip
def test_elo_difference_refuses(p, n, said):
    with pytest.raises(ValueError, match=said):
        elo_difference(p, n)


# Bradley-Terry.


@pytest.mark.parametrize("seed", range(6))
def test_bradley_terry_equals_zermelo(seed):
    draw = random.Random(seed)
    count = 2 + seed % 4
    wins = [[0.0 if i == j else draw.randint(1, 60) / 2 for j in range(count)] for i in range(count)]
    anchor = draw.randrange(count)
    assert bradley_terry_elo(wins, anchor) == pytest.approx(zermelo_elo(wins, anchor), abs=1e-6)


def test_bradley_terry_where_not_all_have_met_and_pairs_are_one_sided():
    # In this ring each pair is won by one side alone, and yet all have lost: a maximum exists, so no rule is needed.
    ring = [[0, 6, 0, 0], [0, 0, 3, 0], [0, 0, 0, 2], [1, 0, 0, 0]]
    elos = bradley_terry_elo(ring)
    assert elos == pytest.approx(zermelo_elo(ring, 0), abs=1e-6)
    with_rule = [[w + 0.5 * (w > 0 or ring[j][i] > 0) for j, w in enumerate(row)] for i, row in enumerate(ring)]
    assert max(abs(x - y) for x, y in zip(elos, zermelo_elo(with_rule, 0), strict=True)) > 1


@settings(deadline=None)
@given(beaten_matrices(), st.data())
def test_bradley_terry_laws(wins, data):
    count = len(wins)
    models = range(count)
    elos = bradley_terry_elo(wins)
    assert elos[0] == 0.0
    assert expected_wins(wins, elos) == pytest.approx([sum(row) for row in wins], rel=1e-9)
    assert bradley_terry_elo(transposed(wins)) == pytest.approx([-elo for elo in elos], abs=1e-7)
    assert bradley_terry_elo([[7 * w for w in row] for row in wins]) == pytest.approx(elos, abs=1e-7)
    anchor = data.draw(st.integers(-count, count - 1))
    assert bradley_terry_elo(wins, anchor) == pytest.approx([elo - elos[anchor] for elo in elos], abs=1e-7)
    order = data.draw(st.permutations(models))
    shuffled = bradley_terry_elo([[wins[i][j] for j in order] for i in order], order.index(0))
    assert shuffled == pytest.approx([elos[i] for i in order], abs=1e-7)
    # One more win of model 1 over model 0 raises it.
    more = [list(row) for row in wins]
    more[1][0] += 1
    assert bradley_terry_elo(more)[1] > elos[1]


@settings(deadline=None)
@given(st.integers(0, 500), st.integers(0, 500))
def test_two_models_have_their_elo_difference(won, lost):
    if not won + lost:
        with pytest.raises(ValueError, match="never compared"):
            bradley_terry_elo([[0, 0], [0, 0]])
        return
    expected = elo_difference(won / (won + lost), won + lost)
    assert bradley_terry_elo([[0, lost], [won, 0]]) == pytest.approx([0.0, expected], abs=1e-7)


def test_lopsided_counts_do_not_make_newton_overshoot():
    # A chain has no cycle, so each pair keeps the Elo it has alone.
    chain = [[0, 1e6, 0, 0], [1, 0, 1e5, 0], [0, 1, 0, 1], [0, 0, 1e6, 0]]
    first, second, third = 400 * 6, 400 * 5, -400 * 6
    assert bradley_terry_elo(chain) == pytest.approx([0, -first, -first - second, -first - second - third], abs=1e-4)
    # Full steps alone diverge on this one, and Zermelo's take too long.
    wins = [[0, 1, 1e6, 1e6], [100, 0, 1e3, 10], [1, 0, 0, 100], [1, 1e6, 100, 0]]
    assert expected_wins(wins, bradley_terry_elo(wins)) == pytest.approx([sum(row) for row in wins], rel=1e-6)


def test_the_rule_is_for_one_sided_pairs_where_there_is_no_maximum():
    # Model 0 never lost; models 1 and 2 shared their games, and keep the Elo of 3 wins in 4 between them.
    elos = bradley_terry_elo([[0, 4, 0], [0, 0, 3], [0, 1, 0]], anchor=1)
    assert elos == pytest.approx([elo_difference(1.0, 4), 0.0, -elo_difference(0.75)], abs=1e-7)
    # A group that never lost to the rest: the pairs inside it are used as they are.
    group = [[0, 3, 5, 0], [1, 0, 0, 2], [0, 0, 0, 2], [0, 0, 2, 0]]
    helped = [[0, 3, 5.5, 0], [1, 0, 0, 2.5], [0.5, 0, 0, 2], [0, 0.5, 2, 0]]
    assert bradley_terry_elo(group) == pytest.approx(zermelo_elo(helped, 0), abs=1e-6)


def test_one_model_alone_is_its_own_anchor():
    assert bradley_terry_elo([[0]]) == [0.0]


@pytest.mark.parametrize(
    ("wins", "anchor", "said"),
    [
        ([[0, 1, 2], [1, 0, 2]], 0, "square"),
        ([], 0, "square"),
        ([[0, -1], [2, 0]], 0, "counts >= 0"),
        ([[0, math.nan], [2, 0]], 0, "finite"),
        ([[0, math.inf], [2, 0]], 0, "finite"),
        ([[1, 1], [1, 0]], 0, "diagonal"),
        ([[0, 1], [1, 0]], 2, "anchor among 2 models, found 2"),
        ([[0, 1], [1, 0]], -3, "anchor among 2 models, found -3"),
        ([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]], 0, "never compared"),
        ([[0, 1, 0], [1, 0, 0], [0, 0, 0]], 0, "never compared"),
    ],
)
def test_bradley_terry_refuses(wins, anchor, said):
    with pytest.raises(ValueError, match=said):
        bradley_terry_elo(wins, anchor)


# Bootstrap.


def mean_of(count):
    return lambda sums: sums / count


def test_bootstrap_keeps_rows_whole_and_sizes_too():
    seen = []

    def statistic(sums):
        seen.append(sums)
        return sums[:, 0]

    bootstrap_interval(statistic, [[1.0, 2.0**i, 3.0 * 2.0**i] for i in range(12)], resamples=50)
    (sums,) = seen
    assert sums.shape == (50, 3) and (sums[:, 0] == 12).all() and (sums[:, 2] == 3 * sums[:, 1]).all()
    assert len(set(sums[:, 1])) > 40  # different draws
    assert sums[:, 1].min() < 2**12 - 1 < sums[:, 1].max()  # with replacement


def test_bootstrap_takes_the_quantiles_of_what_it_drew():
    drawn = []

    def statistic(sums):
        drawn.extend(sums.tolist())
        return sums

    low, high = bootstrap_interval(statistic, [0.3, 1.7, 2.0, 8.0, 5.5, 1.0], resamples=101, confidence=0.9)
    ordered = sorted(drawn)
    assert (low, high) == pytest.approx((ordered[5], ordered[95]))


def test_bootstrap_leaves_out_resamples_without_a_value():
    low, high = bootstrap_interval(
        lambda sums: np.stack([np.where(sums > 3, sums, math.nan), sums * math.nan], 1), [0.0, 1.0, 2.0], resamples=200
    )
    assert low[0] >= 4 and high[0] == 6 and np.isnan([low[1], high[1]]).all()


def test_bootstrap_is_the_same_for_the_same_seed():
    draw = random.Random(1)
    sample = [draw.gauss(0, 1) for _ in range(30)]
    first = bootstrap_interval(mean_of(30), sample, resamples=200, seed=3)
    assert bootstrap_interval(mean_of(30), sample, resamples=200, seed=3) == first
    assert bootstrap_interval(mean_of(30), sample, resamples=200, seed=4) != first


def test_bootstrap_of_a_mean_is_near_the_normal_interval_and_covers():
    draw = random.Random(5)
    sample = [float(draw.random() < 0.3) for _ in range(500)]
    rate = sum(sample) / 500
    half = 1.96 * math.sqrt(rate * (1 - rate) / 500)
    low, high = bootstrap_interval(mean_of(500), sample, resamples=2000)
    assert (low, high) == pytest.approx((rate - half, rate + half), abs=0.15 * half)
    inner_low, inner_high = bootstrap_interval(mean_of(500), sample, resamples=2000, confidence=0.5)
    assert low < inner_low < rate < inner_high < high
    assert inner_high - inner_low == pytest.approx(half * 2 * 0.6745 / 1.96, rel=0.15)

    covered = 0
    for seed in range(300):
        sample = [draw.gauss(2.0, 1.0) for _ in range(40)]
        low, high = bootstrap_interval(mean_of(40), sample, seed=seed)
        covered += low <= 2.0 <= high
    assert 0.89 * 300 <= covered <= 0.98 * 300


@pytest.mark.parametrize("sample", [[], np.zeros((0, 2)), 1.0])
def test_bootstrap_refuses(sample):
    with pytest.raises(ValueError, match="at least one prompt"):
        bootstrap_interval(lambda sums: sums, sample)


def test_elo_interval_is_that_of_each_resample_by_itself(monkeypatch):
    draw = random.Random(2)
    wins_PMM = wins_by_prompt([[draw.gauss(mean, 1) for _ in range(25)] for mean in (0, 0.3, 3.5)])
    drawn = []
    bootstrap_interval(lambda sums: drawn.append(sums) or sums, wins_PMM, resamples=40, seed=7)
    elos = np.array([bradley_terry_elo(wins, anchor=1) for wins in drawn[0]])
    # Some resample has a model that won all, so that the continuity rule is asked of it and not of the others.
    one_sided = (drawn[0] == 25).any((1, 2))
    assert one_sided.any() and not one_sided.all()
    low, high = elo_interval(wins_PMM, anchor=1, resamples=40, confidence=0.8, seed=7)
    assert low == pytest.approx(np.quantile(elos, 0.1, axis=0))
    assert high == pytest.approx(np.quantile(elos, 0.9, axis=0))
    assert low[1] == high[1] == 0


def test_elo_interval_is_finite_when_all_is_won():
    low, high = elo_interval(wins_by_prompt([[0.0] * 8, [1.0] * 8]), resamples=20)
    assert low.tolist() == high.tolist() == pytest.approx([0.0, elo_difference(1.0, 8)])
    low, high = elo_interval(wins_by_prompt([[0.0] * 7 + [2.0], [1.0] * 8]), resamples=200)
    assert low[1] < elo_difference(7 / 8) < high[1] == pytest.approx(elo_difference(1.0, 8))


def test_elo_interval_of_six_models_is_quick():
    draw = np.random.default_rng(0)
    wins_PMM = wins_by_prompt((draw.normal(size=(6, 1000)) + np.arange(6)[:, None]).tolist())
    started = time.process_time()
    elo_interval(wins_PMM)
    assert time.process_time() - started < 2
