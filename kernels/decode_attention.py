"""Attention of each sample's newest token over its slot of the rollout's key/value cache. Forward only.

Split-K ("flash-decoding", Dao et al., 2023): the cells that a sample sees are dealt to several programs, so that few
samples still fill a GPU; each leaves its part of the softmax, and a second kernel adds the parts up.

Legend: C samples, G key/value heads on this rank, q query heads of each, D head size, K cells of a slot, S splits.
"""

import torch

from .backend import interpreted, tl, triton, use_triton

# Programs that keep a large GPU's memory busy whatever the samples' lengths, about eight on each multiprocessor.
_PROGRAMS = 1024
# A split is not worth its part of the sum below this many cells; and parts that one combining program reads quickly.
_CELLS, _MOST_SPLITS = 128, 128
# Of keys, and as much of values, that a program loads at a time; two such pairs are in flight.
_BLOCK_BYTES = 2**14


@torch.no_grad()
def decode_attention(
    query_CGqD: torch.Tensor,
    keys_CGKD: torch.Tensor,
    values_CGKD: torch.Tensor,
    positions_C: torch.Tensor,
    window: int | None = None,
) -> torch.Tensor:
    """softmax(q kᵀ / sqrt(D)) v over the cells max(0, position - window) to position of each sample, both included.

    Args:
        query_CGqD: [C, G, q, D] fp32, bf16 or fp16; query head g * q + i of the model is [g, i]. Keys already rotated.
        keys_CGKD, values_CGKD: [C, G, K, D], of the query's dtype, views of the cache with any strides; the Triton path
            copies neither. It reads fastest where D is innermost and rows begin at multiples of 16 bytes.
        positions_C: [C] int32 or int64, the cell of each newest token, whose key and value are there already;
            0 <= position < K. What other cells hold does not matter, NaN included.
        window: a token sees itself and this many before it (None: all).

    Returns:
        context [C, G, q, D] of the query's dtype. Rollouts have no gradient, and neither has it.

    Scores, softmax and sums are fp32, and the context is rounded once; the Triton path also rounds each softmax weight
    to the values' dtype, as the tensor cores take it: a relative error of 2^-9 in bf16, 2^-12 in fp16, none in fp32.
    It does not wait for the device, and what it launches depends on shapes and strides only, so that a CUDA graph may
    hold it while positions change. The last bits of a sample's context depend on C, which decides how it is split.
    The PyTorch path makes fp32 copies of keys and values in half precision, and computes all K cells: cut the views to
    what is visible. On CPU it copies fp32 values only if an unseen cell is not finite.
    """
    path = _triton if use_triton(query_CGqD) else _torch
    return path(query_CGqD, keys_CGKD, values_CGKD, positions_C, window)


def _torch(query_CGqD, keys_CGKD, values_CGKD, positions_C, window):
    cells_K = torch.arange(keys_CGKD.size(2), device=keys_CGKD.device)
    hidden_CK = cells_K > positions_C[:, None]
    if window is not None:
        hidden_CK |= cells_K < positions_C[:, None] - window
    scores_CGqK = (query_CGqD.float() * query_CGqD.size(3) ** -0.5) @ keys_CGKD.float().transpose(2, 3)
    weights_CGqK = scores_CGqK.masked_fill_(hidden_CK[:, None, None], float("-inf")).softmax(dim=3)
    values_CGKD = values_CGKD.float()
    # 0 x NaN is NaN. Clearing unseen cells copies them all, so a CPU looks first; a GPU would have to wait for that.
    if not values_CGKD.is_cuda:
        context_CGqD = weights_CGqK @ values_CGKD
        if context_CGqD.isfinite().all():
            return context_CGqD.to(query_CGqD.dtype)
    context_CGqD = weights_CGqK @ values_CGKD.masked_fill(hidden_CK[:, None, :, None], 0.0)
    return context_CGqD.to(query_CGqD.dtype)


@triton.jit
def _visible(position_ptr, cells, window, splits, BLOCK_K: tl.constexpr):
    """The cells [first, end) that a sample sees, their blocks [low, high), and how many of these each split takes."""
    position = tl.load(position_ptr).to(tl.int32)
    first = tl.maximum(position - window, 0)
    end = tl.minimum(position + 1, cells)
    low = first // BLOCK_K
    high = tl.cdiv(end, BLOCK_K)
    return first, end, low, high, tl.maximum(tl.cdiv(high - low, splits), 1)


@triton.jit
def _dot(a, b, sums, WIDEN: tl.constexpr):
    if WIDEN:  # the interpreter keeps bf16 as uint16, and would multiply those
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def _split_kernel(
    query_ptr, keys_ptr, values_ptr, positions_ptr, context_ptr, parts_ptr, statistics_ptr,
    query_C, query_G, query_q, query_D, keys_C, keys_G, keys_K, keys_D, values_C, values_G, values_K, values_D,
    position_C, groups, cells, window, splits, log2_scale,
    Q: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One program per sample, key/value head and split: its part of Σ exp(s - max) v, max and Σ exp(s - max).

    All query heads of a group share what is read; their rows are padded to what a tensor core takes. WHOLE: the only
    split, which writes the context.
    """
    pair, split = tl.program_id(0), tl.program_id(1)
    sample, group = (pair // groups).to(tl.int64), (pair % groups).to(tl.int64)
    first, end, low, high, share = _visible(positions_ptr + sample * position_C, cells, window, splits, BLOCK_K)
    start = low + split * share
    stop = tl.minimum(start + share, high)
    if start < stop:
        row, d, lane = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_K)
        inside = (row < Q)[:, None] & (d < D)[None, :]
        query_ptr += sample * query_C + group * query_G
        query = tl.load(query_ptr + row[:, None] * query_q + d[None, :] * query_D, mask=inside, other=0.0)
        begin = start.to(tl.int64) * BLOCK_K
        keys_ptr += sample * keys_C + group * keys_G + begin * keys_K
        values_ptr += sample * values_C + group * values_G + begin * values_K
        keys_ptrs = keys_ptr + d[:, None] * keys_D + lane[None, :] * keys_K
        values_ptrs = values_ptr + lane[:, None] * values_K + d[None, :] * values_D

        largest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_Q], tl.float32)
        context = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        for block in range(start, stop):  # every block holds a cell that is seen, so that no maximum is -inf
            cell = block * BLOCK_K + lane
            seen = (cell >= first) & (cell < end)
            key = tl.load(keys_ptrs, mask=(d < D)[:, None] & seen[None, :], other=0.0)
            score = _dot(query, key, tl.zeros([BLOCK_Q, BLOCK_K], tl.float32), WIDEN) * log2_scale
            score = tl.where(seen[None, :], score, float("-inf"))
            new_largest = tl.maximum(largest, tl.max(score, axis=1))
            weight = tl.exp2(score - new_largest[:, None])
            shrink = tl.exp2(largest - new_largest)
            total = total * shrink + tl.sum(weight, axis=1)
            value = tl.load(values_ptrs, mask=seen[:, None] & (d < D)[None, :], other=0.0)
            context = _dot(weight.to(value.dtype), value, context * shrink[:, None], WIDEN)
            largest = new_largest
            keys_ptrs += BLOCK_K * keys_K
            values_ptrs += BLOCK_K * values_K

        if WHOLE:
            context_ptr += pair.to(tl.int64) * (Q * D)
            rounded = (context / total[:, None]).to(context_ptr.dtype.element_ty)
            tl.store(context_ptr + row[:, None] * D + d[None, :], rounded, mask=inside)
        else:
            place = (pair.to(tl.int64) * splits + split) * Q + row
            tl.store(parts_ptr + place[:, None] * D + d[None, :], context, mask=inside)
            tl.store(statistics_ptr + place * 2, largest, mask=row < Q)
            tl.store(statistics_ptr + place * 2 + 1, total, mask=row < Q)


@triton.jit
def _combine_kernel(
    parts_ptr, statistics_ptr, positions_ptr, context_ptr, position_C, groups, cells, window, splits,
    Q: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program per query head of a sample: the parts of the splits that saw something become its context."""
    head = tl.program_id(0)
    pair = head // Q
    sample = (pair // groups).to(tl.int64)
    _, _, low, high, share = _visible(positions_ptr + sample * position_C, cells, window, splits, BLOCK_K)
    used = tl.cdiv(high - low, share)
    split, d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    place = (pair.to(tl.int64) * splits + split) * Q + head % Q
    largest, total = float("-inf"), 0.0
    context = tl.zeros([BLOCK_D], tl.float32)
    for begin in range(0, used, BLOCK_S):
        wrote = begin + split < used
        here = place + begin * Q
        part_largest = tl.load(statistics_ptr + here * 2, mask=wrote, other=float("-inf"))
        part_total = tl.load(statistics_ptr + here * 2 + 1, mask=wrote, other=0.0)
        part = tl.load(parts_ptr + here[:, None] * D + d[None, :], mask=wrote[:, None] & (d < D)[None, :], other=0.0)
        new_largest = tl.maximum(largest, tl.max(part_largest, axis=0))
        weight, shrink = tl.exp2(part_largest - new_largest), tl.exp2(largest - new_largest)
        total = total * shrink + tl.sum(weight * part_total, axis=0)
        context = context * shrink + tl.sum(weight[:, None] * part, axis=0)
        largest = new_largest
    rounded = (context / total).to(context_ptr.dtype.element_ty)
    tl.store(context_ptr + head.to(tl.int64) * D + d, rounded, mask=d < D)


def _plan(samples: int, groups: int, cells: int, head_size: int, itemsize: int) -> tuple[int, int]:
    """Cells of a block, and splits of a slot: from shapes alone, as a CUDA graph needs it."""
    block = _BLOCK_BYTES // (max(16, triton.next_power_of_2(head_size)) * itemsize)
    block = min(max(block, 16), 128)
    splits = min(triton.cdiv(_PROGRAMS, samples * groups), triton.cdiv(cells, max(block, _CELLS)), _MOST_SPLITS)
    return block, splits


def _triton(query_CGqD, keys_CGKD, values_CGKD, positions_C, window):
    samples, groups, heads, head_size = query_CGqD.shape
    cells = keys_CGKD.size(2)
    context_CGqD = torch.empty(query_CGqD.shape, dtype=query_CGqD.dtype, device=query_CGqD.device)
    if context_CGqD.numel() == 0:
        return context_CGqD
    block_K, splits = _plan(samples, groups, cells, head_size, keys_CGKD.element_size())
    block_Q = max(16, triton.next_power_of_2(heads))
    block_D = max(16, triton.next_power_of_2(head_size))
    whole = splits == 1
    # With more of the sums in a thread, fp32 spills its registers.
    warps = 4 if block_Q * block_D * keys_CGKD.element_size() <= 4096 else 8
    parts_CGSqD = statistics_CGSq2 = context_CGqD  # not touched by the only split
    if not whole:
        size = samples, groups, splits, heads
        parts_CGSqD = torch.empty(*size, head_size, dtype=torch.float32, device=query_CGqD.device)
        statistics_CGSq2 = torch.empty(*size, 2, dtype=torch.float32, device=query_CGqD.device)
    window = cells if window is None else min(window, cells)
    log2_scale = head_size**-0.5 * 1.4426950408889634  # exp(x) = 2^(x log2 e)
    _split_kernel[(samples * groups, splits)](
        query_CGqD, keys_CGKD, values_CGKD, positions_C, context_CGqD, parts_CGSqD, statistics_CGSq2,
        *query_CGqD.stride(), *keys_CGKD.stride(), *values_CGKD.stride(), positions_C.stride(0),
        groups, cells, window, splits, log2_scale,
        Q=heads, D=head_size, BLOCK_Q=block_Q, BLOCK_D=block_D, BLOCK_K=block_K, WHOLE=whole,
        WIDEN=interpreted(), num_warps=warps, num_stages=3,
    )  # fmt: skip
    if not whole:
        _combine_kernel[(samples * groups * heads,)](
            parts_CGSqD, statistics_CGSq2, positions_C, context_CGqD, positions_C.stride(0),
            groups, cells, window, splits,
            Q=heads, D=head_size, BLOCK_D=block_D, BLOCK_K=block_K,
            BLOCK_S=min(triton.next_power_of_2(splits), max(1, 4096 // block_D)), num_warps=4,
        )  # fmt: skip
    return context_CGqD
