"""Attention over slots of a key/value cache, on both paths, against the formula in float64 and its laws.

Legend: C samples, G key/value heads, q query heads of each, D head size, K cells of a slot.
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_safe.kernels import decode_attention as module
from megatron_safe.kernels.decode_attention import decode_attention

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
few = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 cells, splits of two or three: a small slot has several, the last of them not full."""
    monkeypatch.setattr(module, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(module, "_CELLS", 32)


def make(positions, cells, groups=2, heads=3, size=16, seed=0, device="cpu", dtype=torch.float32, scale=1.0):
    """(query, keys, values, positions); whatever is not to be seen is NaN."""
    generator = torch.Generator().manual_seed(seed)
    samples = len(positions)
    query_CGqD = torch.randn(samples, groups, heads, size, generator=generator) * scale
    keys_CGKD, values_CGKD = torch.randn(2, samples, groups, cells, size, generator=generator)
    for sample, position in enumerate(positions):
        keys_CGKD[sample, :, position + 1 :] = values_CGKD[sample, :, position + 1 :] = math.nan
    tensors = (x.to(device, dtype) for x in (query_CGqD, keys_CGKD, values_CGKD))
    return *tensors, torch.tensor(positions, device=device)


def reference(query_CGqD, keys_CGKD, values_CGKD, positions_C, window=None):
    """The formula, by Python floats, one head of one sample after the other."""
    size = query_CGqD.size(3)
    context_CGqD = torch.empty(query_CGqD.shape, dtype=torch.float64)
    for c, g, i in torch.cartesian_prod(*(torch.arange(n) for n in query_CGqD.shape[:3])).tolist():
        position = int(positions_C[c])
        first = 0 if window is None else max(0, position - window)
        query = query_CGqD[c, g, i].tolist()
        keys = keys_CGKD[c, g, first : position + 1].tolist()
        values = values_CGKD[c, g, first : position + 1].tolist()
        scores = [math.fsum(x * y for x, y in zip(query, key, strict=True)) / math.sqrt(size) for key in keys]
        weights = [math.exp(score - max(scores)) for score in scores]
        for d in range(size):
            sum_d = math.fsum(w * value[d] for w, value in zip(weights, values, strict=True))
            context_CGqD[c, g, i, d] = sum_d / math.fsum(weights)
    return context_CGqD


def check(inputs, window=None, atol=2e-6):
    found = decode_attention(*inputs, window)
    assert found.dtype == inputs[0].dtype and found.shape == inputs[0].shape
    torch.testing.assert_close(found.cpu().double(), reference(*inputs, window), atol=atol, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 0, 1, 15, 16, 33, 1000])
@pytest.mark.parametrize("heads", [1, 3])
def test_equals_the_formula(device, small_blocks, heads, window):
    """Positions on both sides of a block's end; 70 cells are four blocks and a bit."""
    check(make([0, 69, 15, 16, 40], 70, heads=heads, device=device), window)


@pytest.mark.parametrize("size", [8, 16, 80, 96, 128, 256])
def test_head_sizes(device, size):
    check(make([37, 4], 38, groups=1, heads=2, size=size, seed=1, device=device))


@pytest.mark.parametrize("groups, heads", [(1, 1), (4, 1), (1, 17), (3, 5)])
def test_groups_of_query_heads(device, small_blocks, groups, heads):
    check(make([20, 33], 34, groups=groups, heads=heads, seed=2, device=device), 25)


@pytest.mark.parametrize("cells, programs, splits", [(300, 1024, 3), (300, 1, 1), (128, 1024, 1), (300, 3, 2)])
def test_blocks_of_full_size(device, monkeypatch, cells, programs, splits):
    pytest.importorskip("triton")
    monkeypatch.setattr(module, "_PROGRAMS", programs)
    inputs = make([cells - 1, 130 % cells], cells, groups=1, heads=2, seed=3, device=device)
    assert module._plan(2, 1, cells, 16, 4) == (128, splits)
    check(inputs)
    check(inputs, 127)


@pytest.mark.parametrize("largest", [3, 543])
def test_more_splits_than_are_combined_at_once(device, small_blocks, largest):
    """17 splits of 256 columns are added up 16 at a time; the largest score is in the first or the last of them."""
    pytest.importorskip("triton")
    assert module._plan(1, 1, 544, 256, 4) == (16, 17)
    inputs = make([543], 544, groups=1, heads=1, size=256, seed=4, device=device)
    inputs[1][:, :, largest] = inputs[0][:, :, 0] / 3  # a score of about 5
    check(inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_halves_are_accumulated_in_fp32(device, small_blocks, dtype):
    """Two roundings, one of the weights and one of the context: each of half an ulp of the largest value."""
    inputs = make([60, 7, 69], 70, seed=5, device=device, dtype=dtype)
    largest = float(inputs[2].nan_to_num().abs().max())
    check(inputs, atol=max(2e-6, torch.finfo(dtype).eps * largest))


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_the_torch_path_rounds_once(dtype):
    inputs = make([60, 7, 69], 70, seed=5, dtype=dtype)
    expected = reference(*inputs)
    error = (decode_attention(*inputs).double() - expected).abs()
    assert (error <= torch.finfo(dtype).eps / 2 * expected.abs() * 1.01 + 1e-6).all()


@pytest.mark.parametrize("largest", ["first", "last"])
def test_scores_in_the_hundreds(device, small_blocks, largest):
    """The online maximum rises in every block, or never after the first."""
    query_CGqD, keys_CGKD, values_CGKD, positions_C = make([69, 50], 70, seed=6, device=device)
    direction = torch.arange(70, device=device) * (1.0 if largest == "last" else -1.0)
    query_CGqD[..., 0], keys_CGKD[..., 0] = 40.0, direction
    check((query_CGqD, keys_CGKD, values_CGKD, positions_C), atol=2e-4)  # fp32 scores near 700


def layouts(x):
    """The same tensor at other strides: K innermost, K outermost, every other cell, some heads of several."""
    yield x.transpose(2, 3).contiguous().transpose(2, 3)
    yield x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    yield torch.stack([x, torch.full_like(x, math.nan)], dim=3).flatten(2, 3)[:, :, ::2]
    yield torch.cat([x, x + 1], dim=1)[:, : x.size(1)]


@pytest.mark.parametrize("positions_dtype", [torch.int32, torch.int64])
def test_any_strides(device, small_blocks, positions_dtype):
    query_CGqD, keys_CGKD, values_CGKD, positions_C = make([0, 37, 20], 38, seed=7, device=device)
    expected = decode_attention(query_CGqD, keys_CGKD, values_CGKD, positions_C, 30)
    every_other_C = torch.stack([positions_C, positions_C * 0 - 7], dim=1).to(positions_dtype)[:, 0]
    other_queries = torch.stack([query_CGqD, query_CGqD * 0], dim=-1)[..., 0]
    for keys, values in zip(layouts(keys_CGKD), [*layouts(values_CGKD)][::-1], strict=True):
        assert keys.stride() != keys_CGKD.stride() and values.stride() not in (values_CGKD.stride(), keys.stride())
        found = decode_attention(other_queries, keys, values, every_other_C, 30)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_what_is_not_seen_does_not_matter(device, small_blocks):
    """To the bit: NaN, infinities, what an earlier sample left, behind the position and before the window."""
    positions, window = [0, 30, 47, 16], 20
    query_CGqD, keys_CGKD, values_CGKD, positions_C = make(positions, 48, seed=8, device=device)
    outside_CK = torch.ones(4, 48, dtype=torch.bool, device=device)
    for sample, position in enumerate(positions):
        outside_CK[sample, max(0, position - window) : position + 1] = False
    found = []
    for junk in (0.0, math.nan, math.inf, -math.inf, 3e38):
        junked = (x.masked_fill(outside_CK[:, None, :, None], junk) for x in (keys_CGKD, values_CGKD))
        found.append(decode_attention(query_CGqD, *junked, positions_C, window))
        assert torch.equal(found[-1], found[0])
    expected = reference(query_CGqD, keys_CGKD, values_CGKD, positions_C, window)
    torch.testing.assert_close(found[0].cpu().double(), expected, atol=2e-6, rtol=1e-5)


def test_what_is_seen_and_nan_shows(device, small_blocks):
    """In the sample and head that hold it, nowhere else."""
    query_CGqD, keys_CGKD, values_CGKD, positions_C = make([40, 40], 41, seed=9, device=device)
    keys_CGKD[0, 1, 20] = math.nan
    values_CGKD[1, 0, 3] = math.nan
    finite = decode_attention(query_CGqD, keys_CGKD, values_CGKD, positions_C).isfinite().all(dim=3).all(dim=2)
    assert finite.tolist() == [[True, False], [False, True]]


def test_the_first_token_attends_to_itself(device, small_blocks):
    inputs = make([0, 0], 40, seed=10, device=device)
    expected = inputs[2][:, :, :1].expand(inputs[0].shape)
    assert torch.equal(decode_attention(*inputs), expected)
    inputs = make([39, 17], 40, seed=10, device=device)
    newest = torch.stack([inputs[2][0, :, 39:40], inputs[2][1, :, 17:18]])
    assert torch.equal(decode_attention(*inputs, 0), newest.expand(inputs[0].shape))


def test_no_samples_and_no_gradient(device):
    query_CGqD, *rest = make([5, 3], 20, device=device)
    assert not decode_attention(query_CGqD.requires_grad_(), *rest).requires_grad
    assert decode_attention(*(x[:0] for x in (query_CGqD, *rest))).shape == (0, *query_CGqD.shape[1:])


@st.composite
def batches(draw):
    """make(...)'s arguments and a window."""
    cells = draw(st.integers(1, 50))
    positions = draw(st.lists(st.integers(0, cells - 1), min_size=1, max_size=4))
    shape = dict(
        groups=draw(st.integers(1, 2)), heads=draw(st.integers(1, 3)), size=draw(st.sampled_from([2, 16, 20])),
        seed=draw(st.integers(0, 10_000)), scale=draw(st.sampled_from([0.0, 1.0, 5.0])),
    )  # fmt: skip
    return positions, cells, shape, draw(st.none() | st.integers(0, 60))


@few
@given(batch=batches())
def test_any_shape(device, small_blocks, batch):
    positions, cells, shape, window = batch
    check(make(positions, cells, device=device, **shape), window, atol=1e-5)


@few
@given(batch=batches(), data=st.data())
def test_samples_are_apart(device, small_blocks, batch, data):
    """Permuting the samples permutes their contexts."""
    positions, cells, shape, window = batch
    inputs = make(positions, cells, device=device, **shape)
    order = data.draw(st.permutations(range(len(positions))))
    found = decode_attention(*(x[order] for x in inputs), window)
    torch.testing.assert_close(found, decode_attention(*inputs, window)[order], atol=1e-6, rtol=1e-6)


@few
@given(batch=batches(), seed=st.integers(0, 1000))
def test_a_vector_added_to_all_keys_and_one_to_all_values(device, small_blocks, batch, seed):
    """q·(k + u) = q·k + q·u, and a softmax does not see the constant. Its weights sum to 1: v joins every context."""
    positions, cells, shape, window = batch
    query_CGqD, keys_CGKD, values_CGKD, positions_C = make(positions, cells, device=device, **shape)
    size = len(positions), shape["groups"], 1, shape["size"]
    u, v = (torch.randn(2, *size, generator=torch.Generator().manual_seed(seed))).to(device)
    plain = decode_attention(query_CGqD, keys_CGKD, values_CGKD, positions_C, window)
    found = decode_attention(query_CGqD, keys_CGKD + u, values_CGKD + v, positions_C, window)
    torch.testing.assert_close(found, plain + v, atol=2e-5, rtol=1e-5)


@few
@given(batch=batches())
def test_a_mean_of_what_is_seen(device, small_blocks, batch):
    """No context leaves the range of the visible values; with a query of 0 it is their plain mean."""
    positions, cells, shape, window = batch
    inputs = make(positions, cells, device=device, **shape)
    found = decode_attention(*inputs, window)
    for sample, position in enumerate(positions):
        first = 0 if window is None else max(0, position - window)
        seen = inputs[2][sample, :, None, first : position + 1]
        assert (found[sample] <= seen.amax(dim=2) + 1e-5).all() and (found[sample] >= seen.amin(dim=2) - 1e-5).all()
        if shape["scale"] == 0:
            torch.testing.assert_close(found[sample], seen.mean(dim=2).expand_as(found[sample]), atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 300])
def test_a_cuda_graph_follows_the_positions(window):
    """Captured at one set of positions, replayed at others: nothing about them was decided on the host."""
    query_CGqD, keys_CGKD, values_CGKD, _ = make([999] * 3, 1000, size=64, device="cuda", dtype=torch.bfloat16)
    positions_C = torch.zeros(3, dtype=torch.int64, device="cuda")
    decode_attention(query_CGqD, keys_CGKD, values_CGKD, positions_C, window)  # compiled before it is captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        context_CGqD = decode_attention(query_CGqD, keys_CGKD, values_CGKD, positions_C, window)
    for positions in ([0, 999, 500], [64, 63, 998], [128, 7, 320]):
        positions_C.copy_(torch.tensor(positions))
        graph.replay()
        expected = decode_attention(query_CGqD, keys_CGKD, values_CGKD, positions_C, window)
        assert torch.equal(context_CGqD, expected)
        assert context_CGqD.isfinite().all()
