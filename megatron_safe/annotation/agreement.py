"""What votes come to: the winner, how far people agree, and how far each agrees with the others.

Votes on a question are {unit: {annotator: value}}; a unit is one thing the question was asked about.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from itertools import combinations

import krippendorff
import numpy as np

Votes = Mapping[Hashable, Mapping[str, Hashable]]


def winner(values: Iterable[Hashable]) -> Hashable | None:
    """The value with more votes than any other; None where two or more have the most, or there are none."""
    most = Counter(values).most_common(2)
    if not most or (len(most) == 2 and most[0][1] == most[1][1]):
        return None
    return most[0][0]


def agreement(votes: Votes) -> dict[str, float | int | None]:
    """How far votes on the same units are equal; only units with two votes or more count.

    Returns:
        alpha: Krippendorff's, nominal (Krippendorff, "Content Analysis", chapter 12): 1 where all are, 0 as by chance;
            None where it is not defined, because there are no such units or all their votes are the same.
        equal: the share of pairs of votes on one unit that are equal; None where there are none.
        units: how many count.
    """
    counts = [Counter(by.values()) for by in votes.values() if len(by) > 1]
    values = sorted({value for count in counts for value in count}, key=repr)
    alpha = None
    if len(values) > 1:
        table_UV = np.array([[count[value] for value in values] for count in counts])
        alpha = float(krippendorff.alpha(value_counts=table_UV, level_of_measurement="nominal"))
    pairs = [a == b for by in votes.values() for a, b in combinations(by.values(), 2)]
    return {"alpha": alpha, "equal": sum(pairs) / len(pairs) if pairs else None, "units": len(counts)}


def with_the_others(votes: Votes, annotator: str) -> tuple[int, int]:
    """(equal, compared): on how many units somebody's vote is the winner of the others' votes, of how many that have
    both."""
    equal = compared = 0
    for by in votes.values():
        others = winner(value for name, value in by.items() if name != annotator)
        if annotator in by and others is not None:
            compared += 1
            equal += by[annotator] == others
    return equal, compared
