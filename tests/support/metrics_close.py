"""Metrics of a run beside those of another that computes the same in other orders."""

import math

RELATIVE = 2e-5
"""fp32 sums in another order; measured: 1.1e-5 at worst, after a few optimizer steps."""
ABSOLUTE = 3e-6
"""For metrics that are differences of near-equal numbers (KL, the mean of whitened advantages)."""


def assert_metrics_close(found: list[dict], wanted: list[dict], relative=RELATIVE, absolute=ABSOLUTE) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        wrong = {
            name: (one[name], other[name])
            for name in one
            if not math.isclose(one[name], other[name], rel_tol=relative, abs_tol=absolute)
        }
        assert not wrong, f"step {one.get('step')}: {wrong}"
