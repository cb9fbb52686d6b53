import math
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_safe.kernels.shaped_gae import mixed_moments, shaped_gae

SETTINGS = dict(kl_coeff=0.1, score_clip=3.0, gamma=0.99, lam=0.95)
KINDS = [("rewards_B", "reward_values_BT", -1), ("costs_B", "cost_values_BT", 1)]


def make(spans, columns, seed=0, dtype=torch.float32, device="cpu", junk=math.nan):
    """Inputs whose row b has its action tokens at spans[b] = (first, number); `junk` everywhere else."""
    generator = torch.Generator().manual_seed(seed)
    mask_BT = torch.zeros(len(spans), columns, dtype=torch.bool)
    for row, (first, number) in enumerate(spans):
        mask_BT[row, first : first + number] = True

    def random_BT():
        x_BT = torch.randn(mask_BT.shape, generator=generator, dtype=torch.float64)
        return x_BT.masked_fill(~mask_BT, junk).to(dtype).to(device)

    inputs = {name: random_BT() for name in ("log_probs_BT", "ref_log_probs_BT", "reward_values_BT", "cost_values_BT")}
    for name in ("rewards_B", "costs_B"):
        inputs[name] = 2 * torch.randn(len(spans), generator=generator).to(device)
    return inputs | {"mask_BT": mask_BT.to(device)}


def reference(inputs, kl_coeff, score_clip, gamma, lam):
    """The formulas, in Python floats: ([reward advantages, cost advantages, reward returns, cost returns], sums)."""
    lists = {name: x.double().tolist() if x.is_floating_point() else x.tolist() for name, x in inputs.items()}
    rows, columns = inputs["mask_BT"].shape
    outputs = [[[0.0] * columns for _ in range(rows)] for _ in range(4)]
    pairs = []
    for b in range(rows):
        actions = [t for t in range(columns) if lists["mask_BT"][b][t]]
        for which, (score, values, sign) in enumerate(KINDS):
            advantage, next_value = 0.0, 0.0
            for t in reversed(actions):
                token = sign * kl_coeff * (lists["log_probs_BT"][b][t] - lists["ref_log_probs_BT"][b][t])
                if t == actions[-1]:
                    token += lists[score][b]
                token = min(max(token, -score_clip), score_clip)
                value = lists[values][b][t]
                advantage = token + gamma * next_value - value + gamma * lam * advantage
                next_value = value
                outputs[which][b][t] = advantage
                outputs[which + 2][b][t] = advantage + value
        pairs += [(outputs[0][b][t], outputs[1][b][t]) for t in actions]
    sums = [float(len(pairs))] + [math.fsum(f(r, c) for r, c in pairs) for f in (
        lambda r, c: r, lambda r, c: c, lambda r, c: r * r, lambda r, c: c * c, lambda r, c: r * c
    )]  # fmt: skip
    return [torch.tensor(x, dtype=torch.float64).reshape(rows, columns) for x in outputs], sums


def check(inputs, tolerance=1e-5, **changed):
    chosen = SETTINGS | changed
    found = shaped_gae(**inputs, **chosen)
    expected, sums = reference(inputs, **chosen)
    for found_BT, expected_BT in zip(found[:4], expected, strict=True):
        assert found_BT.dtype == torch.float32
        torch.testing.assert_close(found_BT.cpu().double(), expected_BT, atol=tolerance, rtol=1e-5)
        assert (found_BT[~inputs["mask_BT"]] == 0).all()
    assert found.sums_6.dtype == torch.float64
    scale = max(1.0, sums[3], sums[4])
    torch.testing.assert_close(found.sums_6.tolist(), sums, atol=1e-5 * scale, rtol=1e-5)
    return found


@pytest.mark.parametrize("columns", [1, 2, 3, 5, 64, 257])
def test_equals_the_formulas(device, columns):
    half = columns // 2
    spans = [(0, columns), (half, columns - half), (columns // 3, 1), (0, 0), (columns // 4, half)]
    check(make(spans, columns, device=device))


@pytest.mark.parametrize("columns", [2048, 2049, 4097])
def test_more_than_one_block(device, columns):
    check(make([(7, columns - 9)], columns, seed=columns, device=device), gamma=1.0, lam=0.999, tolerance=1e-4)


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (1.0, 0.0), (0.0, 0.9), (0.5, 1.0)])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter, at inf - inf outside the mask
@pytest.mark.parametrize("junk", [math.nan, -math.inf])
def test_extreme_discounts_and_junk(device, gamma, lam, junk):
    check(make([(0, 9), (3, 4), (9, 0)], 9, device=device, junk=junk), gamma=gamma, lam=lam)


@pytest.mark.parametrize("changed", [{"kl_coeff": 0.0}, {"score_clip": 0.05}, {"score_clip": math.inf}])
def test_penalty_and_clip(device, changed):
    check(make([(0, 9), (3, 4), (8, 1)], 9, device=device), **changed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_only_storage(device, dtype):
    # The reference reads the same rounded numbers: nothing beyond fp32 rounding may be lost.
    check(make([(0, 20), (5, 9)], 20, dtype=dtype, device=device))


spans = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=4)
unit = st.floats(0, 1, width=32)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(columns=st.integers(1, 20), spans=spans, seed=st.integers(0, 999), gamma=unit, lam=unit)
def test_any_shape(device, columns, spans, seed, gamma, lam):
    spans = [(min(first, columns), min(number, max(columns - first, 0))) for first, number in spans]
    check(make(spans, columns, seed, device=device), gamma=gamma, lam=lam)


def test_no_action_at_all(device):
    for rows, columns in [(3, 8), (0, 8), (2, 0)]:
        found = shaped_gae(**make([(0, 0)] * rows, columns, device=device), **SETTINGS)
        for x_BT in found[:4]:
            assert x_BT.shape == (rows, columns) and (x_BT == 0).all()
        assert (found.sums_6 == 0).all()
        mean, var = mixed_moments(found.sums_6, torch.tensor(0.5, device=device))
        assert mean == 0 and var == 0


def test_strided_inputs(device):
    inputs = make([(2, 9), (1, 4)], 12, device=device)
    strided = {
        name: x.t().contiguous().t() if x.dim() == 2 else x.repeat_interleave(2)[::2] for name, x in inputs.items()
    }
    assert not any(x.is_contiguous() for x in strided.values())
    for plain, found in zip(shaped_gae(**inputs, **SETTINGS), shaped_gae(**strided, **SETTINGS), strict=True):
        assert torch.equal(plain, found)


@pytest.mark.parametrize(
    "first, number",
    [(0, 60), (3, 50), (0, 40), (20, 40), (60, 0)],
    ids=["every column", "margins on both sides", "only after", "only before", "no row has any"],
)
def test_slices_of_rows_and_columns_that_all_rows_share(device, monkeypatch, first, number):
    # The PyTorch path masks only outside the columns that all rows share; five slices, the last one smaller.
    monkeypatch.setattr(sys.modules[shaped_gae.__module__], "SLICE_ELEMENTS", 128)
    check(make([(first, number)] * 9, 60, seed=5, device=device))
    moved = [(first, number), (first // 2, number + first // 2), (first + 5, max(number - 9, 0))] * 3
    check(make(moved, 60, seed=6, device=device))
    check(make([*moved[:8], (0, 0)], 60, seed=7, device=device))


def test_many_rows_are_worked_on_in_slices():
    inputs = make([(b % 7, b % 50) for b in range(300)], 1000, seed=5)  # more than one slice of the PyTorch path
    check(inputs)


def test_two_runs_are_bitwise_equal(device):
    inputs = make([(0, 300), (10, 200)], 300, device=device)
    for one, other in zip(shaped_gae(**inputs, **SETTINGS), shaped_gae(**inputs, **SETTINGS), strict=True):
        assert torch.equal(one, other)


def test_sums_hold_the_moments_of_the_mix(device):
    inputs = make([(0, 30), (3, 11), (0, 0)], 30, device=device)
    found = shaped_gae(**inputs, **SETTINGS)
    reward, cost = (x[inputs["mask_BT"]].double() for x in found[:2])
    for lam in (0.0, 0.3, 5.0):
        mixed = (reward - lam * cost) / (1 + lam)
        mean, var = mixed_moments(found.sums_6, torch.tensor([lam], device=device))
        torch.testing.assert_close(mean, mixed.mean(), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(var, mixed.var(correction=0), atol=1e-5, rtol=1e-5)


def test_inputs_that_do_not_fit():
    inputs = make([(0, 4), (1, 2)], 4)
    for wrong, words in [
        ({"cost_values_BT": torch.zeros(2, 5)}, "one shape"),
        ({"rewards_B": torch.zeros(3)}, r"scores \[2\], found \[3\]"),
        ({"gamma": 1.01}, "gamma and lam"),
    ]:
        with pytest.raises(ValueError, match=words):
            shaped_gae(**(inputs | SETTINGS | wrong))
