"""Log-probability and entropy of tokens from vocabulary shards, without gathering the vocabulary.

With z = logits / temperature, M = max z and S = Σ exp(z - M) over the whole vocabulary:
    log p(y) = (z_y - M) - log S,    H = log S - Σ exp(z - M) (z - M) / S,
    d log p(y) / dz_v = 1[v = y] - p_v,    dH / dz_v = -p_v (log p_v + H).

The Triton path reads the logits once forward (online softmax) and once backward, where it writes the gradient over
them. The PyTorch path makes fp32 temporaries of the logits' size and leaves them alone.

Legend: N tokens, V vocabulary, V/p of it on each of p tensor-parallel ranks (`logits_Nv`); statistics of a rank's shard
(`stats_N4`): max M_r, Σ exp(z - M_r), the target's z (0 where another rank has it), Σ exp(z - M_r) (z - M_r).
"""

import torch
import torch.distributed as dist

from .backend import tl, triton, use_triton

# Both paths hold z at or above this. A padded row's finfo.min has probability 0, but 0 * inf would be NaN: divided by a
# temperature below 1, or summed over a shard of nothing but padding, it must stay finite.
LOWEST = -1e30


def combine_shards(local_N4: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Statistics of every rank, [p, N, 4], through one all-gather (p = 1: no collective)."""
    if group is None or group.size() == 1:
        return local_N4.unsqueeze(0)
    gathered_pN4 = local_N4.new_empty(group.size(), *local_N4.shape)
    dist.all_gather(list(gathered_pN4.unbind(0)), local_N4.contiguous(), group=group)
    return gathered_pN4


# Triton.


@triton.jit
def scaled(raw, inverse_temperature):
    """fp32 logits / temperature, not below LOWEST (a global is not visible here)."""
    z = raw.to(tl.float32) * inverse_temperature
    return tl.where(z < -1e30, -1e30, z)  # not tl.maximum, which would hide a NaN


@triton.jit
def _statistics_kernel(
    logits_ptr, targets_ptr, mask_ptr, stats_ptr, row_stride, shard, first, inverse_temperature,
    HAS_MASK: tl.constexpr, WITH_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    end = shard
    if HAS_MASK:
        end = tl.where(tl.load(mask_ptr + row) != 0, shard, 0)
    largest = tl.full((), -1e30, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    weighted = tl.full((), 0.0, tl.float32)
    for start in range(0, end, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < shard
        z = scaled(tl.load(row_ptr + columns, mask=inside, other=float("-inf")), inverse_temperature)
        new_largest = tl.maximum(largest, tl.max(z, axis=0))
        shifted = z - new_largest
        exp = tl.where(inside, tl.exp(shifted), 0.0)
        rescale = tl.exp(largest - new_largest)
        if WITH_ENTROPY:
            weighted = (weighted + (largest - new_largest) * total) * rescale + tl.sum(exp * shifted, axis=0)
        total = total * rescale + tl.sum(exp, axis=0)
        largest = new_largest
    if HAS_MASK:
        total = tl.where(end > 0, total, 1.0)  # log S of a row that was not read: finite
    target = tl.load(targets_ptr + row) - first
    mine = (target >= 0) & (target < end)
    target_z = scaled(tl.load(row_ptr + target, mask=mine, other=0.0), inverse_temperature)
    stats_ptr += row * 4
    tl.store(stats_ptr, largest)
    tl.store(stats_ptr + 1, total)
    tl.store(stats_ptr + 2, tl.where(mine, target_z, 0.0))
    tl.store(stats_ptr + 3, weighted)


@triton.jit
def combine_ranks(stats_ptr, n, inside, rows, ranks, WITH_ENTROPY: tl.constexpr):
    """(log p, H, M, log S) of tokens n from the statistics [p, N, 4] of all ranks."""
    largest = tl.load(stats_ptr + n * 4, mask=inside, other=0.0)
    for rank in range(1, ranks):
        largest = tl.maximum(largest, tl.load(stats_ptr + (rank * rows + n) * 4, mask=inside, other=0.0))
    total = tl.zeros_like(largest)
    target_z = tl.zeros_like(largest)
    weighted = tl.zeros_like(largest)
    for rank in range(0, ranks):
        part_ptr = stats_ptr + (rank * rows + n) * 4
        below = tl.load(part_ptr, mask=inside, other=0.0) - largest
        scale = tl.exp(below)
        part = tl.load(part_ptr + 1, mask=inside, other=1.0) * scale
        total += part
        target_z += tl.load(part_ptr + 2, mask=inside, other=0.0)
        if WITH_ENTROPY:
            weighted += tl.load(part_ptr + 3, mask=inside, other=0.0) * scale + below * part
    log_sum = tl.log(total)
    return (target_z - largest) - log_sum, log_sum - weighted / total, largest, log_sum


@triton.jit
def _combine_kernel(
    stats_ptr, log_probs_ptr, entropy_ptr, max_ptr, log_sum_ptr, rows, ranks,
    WITH_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK tokens."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < rows
    log_prob, entropy, largest, log_sum = combine_ranks(stats_ptr, n, inside, rows, ranks, WITH_ENTROPY)
    tl.store(log_probs_ptr + n, log_prob, mask=inside)
    tl.store(max_ptr + n, largest, mask=inside)
    tl.store(log_sum_ptr + n, log_sum, mask=inside)
    if WITH_ENTROPY:
        tl.store(entropy_ptr + n, entropy, mask=inside)


@triton.jit
def _gradient_kernel(
    logits_ptr, targets_ptr, max_ptr, log_sum_ptr, entropy_ptr, grad_log_probs_ptr, grad_entropy_ptr,
    row_stride, shard, first, blocks, inverse_temperature, HAS_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK columns of a row: the gradient takes the logits' place."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < shard
    cells_ptr = logits_ptr + row * row_stride + columns
    grad_log_prob = tl.load(grad_log_probs_ptr + row)
    active = grad_log_prob != 0.0
    if HAS_ENTROPY:
        grad_entropy = tl.load(grad_entropy_ptr + row)
        active = active | (grad_entropy != 0.0)
    # A row without gradient (a prompt, padding) is written, not read.
    read = columns < tl.where(active, shard, 0)
    z = scaled(tl.load(cells_ptr, mask=read, other=float("-inf")), inverse_temperature)
    log_p = (z - tl.load(max_ptr + row)) - tl.load(log_sum_ptr + row)
    factor = grad_log_prob
    if HAS_ENTROPY:
        factor += grad_entropy * (log_p + tl.load(entropy_ptr + row))
    target = tl.load(targets_ptr + row) - first
    gradient = tl.where(columns == target, grad_log_prob, 0.0) - tl.exp(log_p) * factor
    gradient = tl.where(read, gradient * inverse_temperature, 0.0)
    tl.store(cells_ptr, gradient.to(logits_ptr.dtype.element_ty), mask=inside)


def _block(logits_Nv: torch.Tensor) -> tuple[int, int]:
    """Columns of a program's step, 16 KiB of them at most, and its warps: 16 bytes per thread and load."""
    block = min(max(triton.next_power_of_2(logits_Nv.size(1)), 128), 16384 // logits_Nv.element_size())
    return block, min(8, max(1, block // 256))


def first_column(logits_Nv: torch.Tensor, group: dist.ProcessGroup | None) -> int:
    """The global token id of this shard's first column."""
    return 0 if group is None else group.rank() * logits_Nv.size(1)


def writable_rows(logits_Nv: torch.Tensor) -> torch.Tensor:
    """The logits themselves where the kernels can read and overwrite them, else a contiguous copy."""
    rows, shard = logits_Nv.shape
    # Expanded rows share memory: a gradient written over one of them would destroy the others' logits.
    fits = (logits_Nv.stride(1) == 1 or shard == 1) and (logits_Nv.stride(0) >= shard or rows <= 1)
    return logits_Nv if fits else logits_Nv.contiguous()


def launch_statistics(
    logits_Nv: torch.Tensor,
    targets_N: torch.Tensor,
    temperature: float,
    group: dist.ProcessGroup | None,
    with_entropy: bool,
    mask_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """Statistics of all ranks, [p, N, 4] fp32, from one read of the logits; Triton.

    Rows outside `mask_N` (bool) are not read and have no meaning.
    """
    rows, shard = logits_Nv.shape
    stats_N4 = logits_Nv.new_empty(rows, 4, dtype=torch.float32)
    block, warps = _block(logits_Nv)
    if rows:
        _statistics_kernel[(rows,)](
            logits_Nv, targets_N, targets_N if mask_N is None else mask_N, stats_N4, logits_Nv.stride(0), shard,
            first_column(logits_Nv, group), 1.0 / temperature,
            HAS_MASK=mask_N is not None, WITH_ENTROPY=with_entropy, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return combine_shards(stats_N4, group)


def launch_gradient_(
    logits_Nv: torch.Tensor,
    targets_N: torch.Tensor,
    max_N: torch.Tensor,
    log_sum_N: torch.Tensor,
    entropy_N: torch.Tensor | None,
    grad_log_probs_N: torch.Tensor,
    grad_entropy_N: torch.Tensor | None,
    temperature: float,
    group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """Replace the logits by their gradient; Triton. M and log S as `combine_ranks` gives them, all [N] fp32."""
    rows, shard = logits_Nv.shape
    block, warps = _block(logits_Nv)
    blocks = triton.cdiv(shard, block)
    has_entropy = grad_entropy_N is not None
    logits_Nv = logits_Nv.detach()
    if rows:
        _gradient_kernel[(rows * blocks,)](
            logits_Nv, targets_N, max_N, log_sum_N, entropy_N if has_entropy else max_N, grad_log_probs_N.contiguous(),
            grad_entropy_N.contiguous() if has_entropy else max_N, logits_Nv.stride(0), shard,
            first_column(logits_Nv, group), blocks, 1.0 / temperature,
            HAS_ENTROPY=has_entropy, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    # Autograd must know: whoever still needs the logits for another gradient gets an error, not these numbers.
    torch.autograd.graph.increment_version(logits_Nv)
    return logits_Nv


class _TritonLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_Nv, targets_N, temperature, group, with_entropy):
        rows = logits_Nv.size(0)
        stats_pN4 = launch_statistics(logits_Nv, targets_N, temperature, group, with_entropy)
        log_probs_N, max_N, log_sum_N = (logits_Nv.new_empty(rows, dtype=torch.float32) for _ in range(3))
        entropy_N = logits_Nv.new_empty(rows, dtype=torch.float32) if with_entropy else None
        if rows:
            _combine_kernel[(triton.cdiv(rows, 128),)](
                stats_pN4, log_probs_N, entropy_N if with_entropy else log_probs_N, max_N, log_sum_N, rows,
                stats_pN4.size(0),
                WITH_ENTROPY=with_entropy, BLOCK=128, num_warps=4,
            )  # fmt: skip
        ctx.set_materialize_grads(False)  # most losses take no gradient of the entropy: then it costs nothing
        ctx.save_for_backward(logits_Nv, targets_N, max_N, log_sum_N, entropy_N)
        ctx.temperature, ctx.group = temperature, group
        return log_probs_N, entropy_N

    @staticmethod
    def backward(ctx, grad_log_probs_N, grad_entropy_N):
        if grad_log_probs_N is None and grad_entropy_N is None:
            return (None,) * 5
        logits_Nv, targets_N, max_N, log_sum_N, entropy_N = ctx.saved_tensors
        if grad_log_probs_N is None:
            grad_log_probs_N = torch.zeros_like(max_N)
        grad_Nv = launch_gradient_(
            logits_Nv, targets_N, max_N, log_sum_N, entropy_N, grad_log_probs_N, grad_entropy_N, ctx.temperature,
            ctx.group,
        )  # fmt: skip
        return grad_Nv, None, None, None, None


# PyTorch.


def scaled_logits(logits_Nv: torch.Tensor, temperature: float) -> torch.Tensor:
    """logits / temperature, fp32, not below LOWEST."""
    z_Nv = logits_Nv.float()
    return z_Nv.clamp(min=LOWEST) if temperature == 1 else (z_Nv / temperature).clamp_(min=LOWEST)


class TorchLogProb(torch.autograd.Function):
    """`vocab_parallel_logprob` in PyTorch; apply(logits_Nv, targets_N, temperature, group, with_entropy)."""

    @staticmethod
    def forward(ctx, logits_Nv, targets_N, temperature, group, with_entropy):
        shard = logits_Nv.size(1)
        z_Nv = scaled_logits(logits_Nv, temperature)
        max_N = z_Nv.max(dim=1).values
        # Everything below is relative to the maximum: at |z| = 1e4 an absolute log Z would cost three digits.
        shifted_Nv = z_Nv - max_N[:, None]
        exp_Nv = shifted_Nv.exp()
        sum_N = exp_Nv.sum(dim=1)
        weighted_N = (exp_Nv * shifted_Nv).sum(dim=1) if with_entropy else torch.zeros_like(sum_N)
        local_N = targets_N - first_column(logits_Nv, group)
        inside_N = (local_N >= 0) & (local_N < shard)
        local_N = local_N.clamp(0, shard - 1)
        target_N = torch.where(inside_N, z_Nv.gather(1, local_N[:, None])[:, 0], 0.0)

        stats_pN4 = combine_shards(torch.stack([max_N, sum_N, target_N, weighted_N], dim=1), group)
        global_max_N = stats_pN4[..., 0].max(dim=0).values
        scale_pN = (stats_pN4[..., 0] - global_max_N).exp()
        sums_pN = stats_pN4[..., 1] * scale_pN
        global_sum_N = sums_pN.sum(dim=0)
        log_sum_N = global_sum_N.log()
        log_probs_N = (stats_pN4[..., 2].sum(dim=0) - global_max_N) - log_sum_N
        entropy_N = None
        if with_entropy:
            weighted_pN = stats_pN4[..., 3] * scale_pN + (stats_pN4[..., 0] - global_max_N) * sums_pN
            entropy_N = log_sum_N - weighted_pN.sum(dim=0) / global_sum_N

        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits_Nv, local_N, inside_N, global_max_N, log_sum_N, entropy_N)
        ctx.temperature = temperature
        return log_probs_N, entropy_N

    @staticmethod
    def backward(ctx, grad_log_probs_N, grad_entropy_N):
        if grad_log_probs_N is None and grad_entropy_N is None:
            return (None,) * 5
        logits_Nv, local_N, inside_N, max_N, log_sum_N, entropy_N = ctx.saved_tensors
        if grad_log_probs_N is None:
            grad_log_probs_N = torch.zeros_like(max_N)
        log_p_Nv = (scaled_logits(logits_Nv, ctx.temperature) - max_N[:, None]) - log_sum_N[:, None]
        factor = grad_log_probs_N[:, None]
        if grad_entropy_N is not None:
            factor = factor + grad_entropy_N[:, None] * (log_p_Nv + entropy_N[:, None])
        grad_Nv = log_p_Nv.exp() * -factor
        grad_Nv.scatter_add_(1, local_N[:, None], (grad_log_probs_N * inside_N)[:, None])
        return (grad_Nv / ctx.temperature).to(logits_Nv.dtype), None, None, None, None


def vocab_parallel_logprob(
    logits_Nv: torch.Tensor,
    targets_N: torch.Tensor,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    with_entropy: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log softmax(z / temperature) at the target, and the entropy of that distribution, in nats.

    The backward pass CONSUMES the logits: the Triton path writes their gradient over them (of a non-contiguous tensor
    it makes a copy first, unless only its rows are apart). Read them before, or not at all; an autograd operation that
    still needs them raises an error.

    Args:
        logits_Nv: [N, V/p] fp32, bf16 or fp16; rank r holds columns r V/p to (r + 1) V/p.
        targets_N: [N] int64, global token ids.
        temperature: > 0.
        group: tensor-parallel group (None: the whole vocabulary is here).
        with_entropy: False saves its arithmetic and returns None in its place.

    Returns:
        log-probabilities [N] and entropies [N], fp32, the same on every rank. Both are differentiable; sums
        accumulate in fp32. One collective forward (4 floats a token and rank), none backward.

    The paths differ by the order of their fp32 sums and, as Triton multiplies by 1 / temperature, by one rounding of z:
    about 1e-7 max(1, |z - M|) in a log-probability, and the last bit of a half-precision gradient.
    """
    if use_triton(logits_Nv):
        return _TritonLogProb.apply(
            writable_rows(logits_Nv), targets_N.contiguous(), temperature, group, with_entropy
        )
    return TorchLogProb.apply(logits_Nv, targets_N, temperature, group, with_entropy)
