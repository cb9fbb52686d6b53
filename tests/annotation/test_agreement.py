"""Agreement against the formulas, written out."""

import math
from fractions import Fraction
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_safe.annotation.agreement import agreement, winner, with_the_others

PEOPLE = "abcd"
votes = st.dictionaries(
    st.integers(0, 9), st.dictionaries(st.sampled_from(PEOPLE), st.sampled_from([0, 1, "tie"])), max_size=10
)


def alpha_by_coincidences(votes):
    """Krippendorff's alpha from the coincidence matrix, in exact fractions: 1 - (n - 1) D_o / D_e, with o_cv the sum
    over units of ordered pairs of votes (c, v), each divided by the unit's votes less one."""
    coincidences = {}
    for by in votes.values():
        for a, b in permutations(by.values(), 2):
            coincidences[a, b] = coincidences.get((a, b), 0) + Fraction(1, len(by) - 1)
    totals = {}
    for (a, _), amount in coincidences.items():
        totals[a] = totals.get(a, 0) + amount
    n = sum(totals.values())
    expected = sum(totals[a] * totals[b] for a, b in permutations(totals, 2))
    if not expected:
        return None
    observed = sum(amount for (a, b), amount in coincidences.items() if a != b)
    return float(1 - (n - 1) * observed / expected)


@given(votes)
def test_alpha_and_equal_votes(votes):
    found, expected = agreement(votes), alpha_by_coincidences(votes)
    assert found["alpha"] == (expected if expected is None else pytest.approx(expected, abs=1e-12))
    several = [list(by.values()) for by in votes.values() if len(by) > 1]
    pairs = [a == b for unit in several for i, a in enumerate(unit) for b in unit[:i]]
    assert found["units"] == len(several)
    assert found["equal"] == (pytest.approx(math.fsum(pairs) / len(pairs)) if pairs else None)


def test_alpha_of_the_published_example():
    """Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), C: nominal data, four observers, 0.743."""
    observers = (
        (1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None),
        (1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3),
        (None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None),
        (1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None),
    )
    units = {
        unit: {str(at): value for at, value in enumerate(values) if value is not None}
        for unit, values in enumerate(zip(*observers, strict=True))
    }
    assert agreement(units)["alpha"] == pytest.approx(0.743, abs=5e-4)


@given(st.lists(st.sampled_from([0, 1, "tie", True])))
def test_the_winner_has_more_votes_than_any_other(values):
    found = winner(values)
    ahead = [one for one in set(values) if all(values.count(one) > values.count(other) for other in {*values} - {one})]
    assert [found] == ahead if ahead else found is None
    assert winner(values[::-1]) == found


@given(votes, st.sampled_from(PEOPLE))
def test_with_the_others_leaves_the_one_out(votes, person):
    equal = compared = 0
    for by in votes.values():
        others = [value for name, value in by.items() if name != person]
        counts = sorted((others.count(value) for value in set(others)), reverse=True)
        if person not in by or not counts or counts[1:2] == counts[:1]:
            continue
        compared += 1
        equal += others.count(by[person]) == counts[0]
    assert with_the_others(votes, person) == (equal, compared)
