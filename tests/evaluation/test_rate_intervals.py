"""Wilson's interval, and what becomes of it where several answers share a prompt."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_safe.evaluation.elo import rate_interval, wilson_interval

# Wilson.


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [
        # Newcombe (1998), table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (5, 10, 0.2366, 0.7634),
        (10, 10, 0.7225, 1.0),
    ],
)
def test_known_wilson_intervals(k, n, low, high):
    assert wilson_interval(k, n) == pytest.approx((low, high), abs=5.1e-5)


@settings(deadline=None)
@given(st.integers(1, 2000), st.floats(0, 1), st.sampled_from([(0.95, 1.959963984540054), (0.99, 2.5758293035489004)]))
def test_wilson_ends_are_the_rates_that_the_score_test_just_keeps(n, share, level):
    confidence, z = level
    k = round(share * n)
    low, high = wilson_interval(k, n, confidence)
    assert 0.0 <= low <= k / n <= high <= 1.0 and low < high
    for end in (low, high):
        if 0.0 < end < 1.0:
            assert abs(k / n - end) == pytest.approx(z * math.sqrt(end * (1 - end) / n), rel=1e-6)
    assert (low == 0.0) == (k == 0) and (high == 1.0) == (k == n)
    mirrored = wilson_interval(n - k, n, confidence)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


@pytest.mark.parametrize("p", [0.02, 0.3, 0.53])
def test_wilson_covers(p):
    n = 200
    covered = sum(
        math.comb(n, k) * p**k * (1 - p) ** (n - k)
        for k in range(n + 1)
        if wilson_interval(k, n)[0] <= p <= wilson_interval(k, n)[1]
    )
    assert 0.93 < covered < 0.975


@pytest.mark.parametrize(("k", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses(k, n):
    with pytest.raises(ValueError, match="0 <= k <= n"):
        wilson_interval(k, n)


# Rates of answers that share prompts.


def test_one_answer_to_a_prompt_leaves_wilsons_interval():
    assert rate_interval([True] * 5 + [False] * 15, range(20)) == wilson_interval(5, 20)


def test_alike_answers_to_a_prompt_count_as_one():
    # Four equal answers to each of 50 prompts: the variance is 4 times (up to 50 / 49) that of 200 separate ones.
    outcomes = [i < 10 for i in range(50) for _ in range(4)]
    effect = 4 * 50 / 49
    expected = wilson_interval(40 / effect, 200 / effect)
    assert rate_interval(outcomes, [i for i in range(50) for _ in range(4)]) == pytest.approx(expected)
    none = [False] * 200
    assert rate_interval(none, [i for i in range(50) for _ in range(4)]) == wilson_interval(0, 50)
    assert rate_interval([True, False], ["a", "a"]) == pytest.approx(wilson_interval(0.5, 1))


def test_the_interval_of_clustered_answers_covers():
    draw = np.random.default_rng(3)
    covered = naive = 0
    for _ in range(400):
        prompt_rates = draw.beta(0.3, 0.9, size=60)  # mean 0.25, prompts that differ much
        outcomes = (draw.random((60, 5)) < prompt_rates[:, None]).ravel().tolist()
        low, high = rate_interval(outcomes, [i for i in range(60) for _ in range(5)])
        covered += low <= 0.25 <= high
        low, high = wilson_interval(sum(outcomes), 300)
        naive += low <= 0.25 <= high
    assert 0.92 * 400 <= covered <= 0.98 * 400 and naive < 0.85 * 400
