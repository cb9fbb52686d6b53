"""A run stopped and resumed in a fresh process is the run that never stopped."""

import math

import pytest

PLAIN = ("sft", "reward", "ppo-lag")
SAME_LAYOUT = {
    "one": (*PLAIN, "bf16", "warmup"),
    "tp2": (*PLAIN, "distributed"),
    "dp2": ("distributed", "warmup-distributed"),
}
STOPPED_AFTER = {
    "sft": 2, "reward": 3, "ppo-lag": 1, "bf16": 2, "distributed": 2, "warmup": 1, "warmup-distributed": 1,
}  # fmt: skip


@pytest.mark.parametrize(("layout", "run"), [(layout, run) for layout, runs in SAME_LAYOUT.items() for run in runs])
def test_same_layout_goes_on_bit_for_bit(finished, resumed, metrics_of, layout, run):
    stopped = metrics_of(finished(layout) / "stopped" / run)
    whole = metrics_of(finished(layout) / run)
    assert len(stopped) == STOPPED_AFTER[run] < len(whole)
    assert metrics_of(resumed(layout, layout) / run) == whole


@pytest.mark.parametrize("run", [*PLAIN, "distributed"])
@pytest.mark.parametrize("layout", ["pp2", "one"])
def test_other_layout_goes_on_closely(finished, resumed, metrics_of, layout, run):
    """TP 2's checkpoint in PP 2 and in one process. The tolerance is that of test_layouts.py."""
    whole = metrics_of(finished("tp2") / run)
    found = metrics_of(resumed("tp2", layout) / run)
    assert [line["step"] for line in found] == [line["step"] for line in whole]
    for one, other in zip(found, whole, strict=True):
        wrong = {
            name: (one[name], other[name])
            for name in other
            if not math.isclose(one[name], other[name], rel_tol=2e-5, abs_tol=3e-6)
        }
        assert not wrong, f"step {one['step']}: {wrong}"
