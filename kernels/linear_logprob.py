"""Log-probability and entropy of tokens straight from hidden states: the logits exist one chunk of tokens at a time.

Legend: N tokens, n of them in a chunk, b in a block of one, h hidden size, V vocabulary, v = V/p of it on each of p
tensor-parallel ranks; z, M and S as in `vocab_parallel_logprob`.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist

from .backend import use_triton
from .vocab_parallel_logprob import LOWEST, combine_shards, launch_gradient_, launch_statistics

# Logits of a chunk: large enough for full-speed GEMMs at V = 32k (CPU) and at V = 128k (GPU, 0.5 GB in bf16).
_CPU_CHUNK, _GPU_CHUNK = 2**24, 2**28
# Logits that elementwise work on CPU takes at a time: two such fp32 blocks stay in a core's cache.
_BLOCK = 2**18


class ChunkedHead:
    """The output layer over chunks of tokens: logits, their statistics and their gradient in one reused buffer.

    `load` fills the buffer with a chunk's logits; `statistics` (optional), `gradient` and `backward` work on what is
    there, in this order. Triton's kernels are those of `vocab_parallel_logprob`; the PyTorch path does the same in
    fp32, in place and block by block, with an fp32 copy of the chunk where the weight is in half precision.
    """

    def __init__(
        self,
        hidden_Nh: torch.Tensor,
        weight_vh: torch.Tensor,
        targets_N: torch.Tensor,
        temperature: float,
        group: dist.ProcessGroup | None,
        valid_vocab: int | None,
        chunk_size: int | None,
    ):
        rows, shard = hidden_Nh.size(0), weight_vh.size(0)
        self.hidden_Nh, self.weight_vh, self.temperature = hidden_Nh, weight_vh, temperature
        first = 0 if group is None else group.rank() * shard
        self.valid = shard if valid_vocab is None else min(max(valid_vocab - first, 0), shard)
        self.local_N = targets_N - first
        self.padding = max(LOWEST, torch.finfo(weight_vh.dtype).min)
        if chunk_size is None:
            chunk_size = max(1, (_GPU_CHUNK if weight_vh.is_cuda else _CPU_CHUNK) // shard)
        self.chunk_size = min(chunk_size, max(rows, 1))
        self._logits = self._z = weight_vh.new_empty(self.chunk_size, shard)
        self.triton = use_triton(weight_vh)
        if not self.triton:
            if weight_vh.dtype != torch.float32:
                self._z = weight_vh.new_empty(self.chunk_size, shard, dtype=torch.float32)
            block = self.chunk_size if weight_vh.is_cuda else min(max(1, _BLOCK // shard), self.chunk_size)
            self._scratch = self._z.new_empty(block, shard)

    def chunks(self, weights_N: torch.Tensor | None = None) -> Iterator[slice | torch.Tensor]:
        """Indices of the tokens of each chunk; on CPU only of those whose weight is not 0."""
        rows = self.hidden_Nh.size(0)
        if weights_N is not None and not weights_N.is_cuda:  # on a GPU the host would wait for the count
            live_n = weights_N.nonzero()[:, 0]
            if len(live_n) < rows:
                yield from live_n.split(self.chunk_size) if len(live_n) else ()
                return
        for start in range(0, rows, self.chunk_size):
            yield slice(start, min(start + self.chunk_size, rows))

    def load(self, rows: slice | torch.Tensor) -> None:
        """Logits of a chunk's tokens into the buffer; padded vocabulary rows get a probability of 0."""
        self._hidden_nh = self.hidden_Nh[rows]
        n = self._hidden_nh.size(0)
        self._logits_nv, self._z_nv = self._logits[:n], self._z[:n]
        self._local_n, self._local_max_n = self.local_N[rows], None
        torch.mm(self._hidden_nh, self.weight_vh.t(), out=self._logits_nv)
        self._logits_nv[:, self.valid :] = self.padding
        if self.triton:
            return
        if self._z is not self._logits:
            self._z_nv.copy_(self._logits_nv)
        if self.temperature != 1.0:
            self._z_nv.div_(self.temperature)

    def statistics(self) -> torch.Tensor:
        """[n, 4] of this shard, as `vocab_parallel_logprob` defines them."""
        if self.triton:
            return launch_statistics(self._logits_nv, self._local_n, self.temperature, None, True)[0]
        stats_n4 = self._z_nv.new_empty(self._z_nv.size(0), 4)
        column_n1, inside_n = self._target_columns()
        stats_n4[:, 2] = self._z_nv.gather(1, column_n1)[:, 0] * inside_n
        for z_bv, stats_b4 in self._blocks(self._z_nv, stats_n4):
            shifted_bv = self._scratch[: z_bv.size(0)]
            stats_b4[:, 0] = z_bv.amax(dim=1)
            torch.sub(z_bv, stats_b4[:, :1], out=shifted_bv)
            torch.exp(shifted_bv, out=z_bv)
            stats_b4[:, 1] = z_bv.sum(dim=1)
            stats_b4[:, 3] = shifted_bv.mul_(z_bv).sum(dim=1)
        self._local_max_n = stats_n4[:, 0]  # the buffer holds exp(z - this) now
        return stats_n4

    def gradient(
        self,
        log_z_2n: torch.Tensor,
        weights_n: torch.Tensor,
        entropy_n: torch.Tensor | None = None,
        entropy_weights_n: torch.Tensor | None = None,
    ) -> None:
        """d(Σ w log p + Σ u H)/d logits into the buffer.

        Entropies and their weights u: both or neither, and only without `statistics` before.
        """
        if self.triton:
            launch_gradient_(
                self._logits_nv, self._local_n, *log_z_2n, entropy_n, weights_n, entropy_weights_n, self.temperature,
                None,
            )  # fmt: skip
            return
        minus_w_n1 = (-weights_n / self.temperature)[:, None]
        log_z_n2 = log_z_2n.t()
        if self._local_max_n is not None:  # no second exponential
            self._z_nv.mul_(minus_w_n1 * (self._local_max_n - log_z_n2[:, 0] - log_z_n2[:, 1]).exp_()[:, None])
        elif entropy_weights_n is None:
            for z_bv, log_z_b2, minus_w_b1 in self._blocks(self._z_nv, log_z_n2, minus_w_n1):
                # M before log S: at |z| = 1e4 their sum would cost three digits.
                z_bv.sub_(log_z_b2[:, :1]).sub_(log_z_b2[:, 1:]).exp_().mul_(minus_w_b1)
        else:
            minus_u_n1 = (-entropy_weights_n / self.temperature)[:, None]
            for z_bv, log_z_b2, minus_w_b1, minus_u_b1, entropy_b1 in self._blocks(
                self._z_nv, log_z_n2, minus_w_n1, minus_u_n1, entropy_n[:, None]
            ):
                factor_bv = self._scratch[: z_bv.size(0)]
                z_bv.sub_(log_z_b2[:, :1]).sub_(log_z_b2[:, 1:])
                torch.add(z_bv, entropy_b1, out=factor_bv).mul_(minus_u_b1).add_(minus_w_b1)
                z_bv.exp_().mul_(factor_bv)
        column_n1, inside_n = self._target_columns()
        self._z_nv.scatter_add_(1, column_n1, minus_w_n1 * -inside_n.float()[:, None])

    def backward(
        self,
        rows: slice | torch.Tensor,
        grad_hidden_Nh: torch.Tensor | None,
        grad_weight_vh: torch.Tensor | None,
    ) -> None:
        """From the gradient in the buffer: this shard's part of d hidden, and d weight added to an fp32 sum."""
        if self._z is not self._logits:
            self._logits_nv.copy_(self._z_nv)
        if grad_hidden_Nh is not None:
            grad_hidden_Nh[rows] = torch.mm(self._logits_nv, self.weight_vh)
        if grad_weight_vh is None:
            return
        if grad_weight_vh.is_cuda and self._logits.dtype != torch.float32:
            # Tensor cores multiply halves and add in fp32; out_dtype keeps that sum instead of rounding each chunk's.
            torch.addmm(
                grad_weight_vh, self._logits_nv.t(), self._hidden_nh, out_dtype=torch.float32, out=grad_weight_vh
            )
        else:
            grad_weight_vh.addmm_(self._z_nv.float().t(), self._hidden_nh.float())

    def _target_columns(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where to look for each target, [n, 1], and whether it is there."""
        column_n = self._local_n.clamp(0, self._z.size(1) - 1)
        return column_n[:, None], column_n == self._local_n

    def _blocks(self, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        return zip(*(tensor.split(self._scratch.size(0)) for tensor in tensors), strict=True)


def combine_statistics(
    local_N4: torch.Tensor, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities [N], entropies [N] and (M, log S) [2, N] from the statistics of all shards."""
    stats_pN4 = combine_shards(local_N4, group) if len(local_N4) else local_N4[None]
    max_N = stats_pN4[..., 0].amax(dim=0)
    offset_pN = stats_pN4[..., 0] - max_N
    scale_pN = offset_pN.exp()
    sums_pN = stats_pN4[..., 1] * scale_pN
    sum_N = sums_pN.sum(dim=0)
    log_sum_N = sum_N.log()
    weighted_N = (stats_pN4[..., 3] * scale_pN + offset_pN * sums_pN).sum(dim=0)
    log_probs_N = (stats_pN4[..., 2].sum(dim=0) - max_N) - log_sum_N
    return log_probs_N, log_sum_N - weighted_N / sum_N, torch.stack([max_N, log_sum_N])


def gather_rows(hidden: torch.Tensor, group: dist.ProcessGroup | None, sequence_parallel: bool) -> torch.Tensor:
    """With sequence parallelism, the rows of all ranks, in rank order; otherwise `hidden` itself."""
    if not sequence_parallel or group is None or group.size() == 1:
        return hidden
    whole_Nh = hidden.new_empty(group.size() * hidden.size(0), hidden.size(1))
    dist.all_gather_into_tensor(whole_Nh, hidden.contiguous(), group=group)
    return whole_Nh


def reduce_rows(grad_Nh: torch.Tensor, group: dist.ProcessGroup | None, sequence_parallel: bool) -> torch.Tensor:
    """Sum a gradient over vocabulary shards: every row on every rank, or each rank's own rows. May reuse its input."""
    if group is None or group.size() == 1:
        return grad_Nh
    if not sequence_parallel:
        dist.all_reduce(grad_Nh, group=group)
        return grad_Nh
    own = grad_Nh.new_empty(grad_Nh.size(0) // group.size(), grad_Nh.size(1))
    dist.reduce_scatter_tensor(own, grad_Nh, group=group)
    return own


def main_grad_of(weight_vh: torch.Tensor, gradient_accumulation_fusion: bool) -> torch.Tensor | None:
    """Megatron's gradient buffer of this weight, if the gradient is to go straight into it."""
    return getattr(weight_vh, "main_grad", None) if gradient_accumulation_fusion else None


def deliver_weight_gradient(
    weight_vh: torch.Tensor, grad_vh: torch.Tensor, main_grad_vh: torch.Tensor | None
) -> torch.Tensor | None:
    """What autograd gets for the weight: the gradient, or after adding it to `main_grad` what Megatron's layers return.

    As in `tensor_parallel.layers`: `grad_added_to_main_grad` tells Megatron's hook to ignore the placeholder, which
    is zero where the hook reads it all the same, because a tied embedding's gradient arrives in the same tensor.
    """
    if main_grad_vh is None:
        return grad_vh.to(weight_vh.dtype)
    if grad_vh is not main_grad_vh:
        main_grad_vh.add_(grad_vh)
    weight_vh.main_grad = main_grad_vh
    if not hasattr(weight_vh, "grad_added_to_main_grad"):
        return None
    weight_vh.grad_added_to_main_grad = True
    return torch.zeros_like(weight_vh) if getattr(weight_vh, "zero_out_wgrad", False) else torch.empty_like(weight_vh)


def new_weight_gradient(weight_vh: torch.Tensor, main_grad_vh: torch.Tensor | None) -> torch.Tensor:
    """Where the weight's gradient accumulates: Megatron's buffer if it is in fp32, else new zeros in fp32."""
    if main_grad_vh is not None and main_grad_vh.dtype == torch.float32:
        return main_grad_vh
    return torch.zeros_like(weight_vh, dtype=torch.float32)


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight_vh, targets_N, sequence_parallel, fusion, temperature, group, *chunking):
        ctx.set_materialize_grads(False)
        options = temperature, group, *chunking
        head = ChunkedHead(gather_rows(hidden, group, sequence_parallel), weight_vh, targets_N, *options)
        local_N4 = torch.empty(len(targets_N), 4, dtype=torch.float32, device=hidden.device)
        for rows in head.chunks():
            head.load(rows)
            local_N4[rows] = head.statistics()
        log_probs_N, entropy_N, log_z_2N = combine_statistics(local_N4, group)
        ctx.save_for_backward(hidden, weight_vh, targets_N, entropy_N, log_z_2N)
        ctx.options, ctx.group, ctx.sequence_parallel = options, group, sequence_parallel
        ctx.main_grad = main_grad_of(weight_vh, fusion)
        return log_probs_N, entropy_N

    @staticmethod
    def backward(ctx, weights_N, entropy_weights_N):
        hidden, weight_vh, targets_N, entropy_N, log_z_2N = ctx.saved_tensors
        if weights_N is None:
            weights_N = torch.zeros_like(entropy_N)
        hidden_Nh = gather_rows(hidden, ctx.group, ctx.sequence_parallel)
        grad_hidden_Nh = torch.zeros_like(hidden_Nh) if ctx.needs_input_grad[0] else None
        grad_weight_vh = new_weight_gradient(weight_vh, ctx.main_grad) if ctx.needs_input_grad[1] else None
        head = ChunkedHead(hidden_Nh, weight_vh, targets_N, *ctx.options)
        counted_N = weights_N if entropy_weights_N is None else weights_N.abs() + entropy_weights_N.abs()
        for rows in head.chunks(counted_N):
            head.load(rows)
            if entropy_weights_N is None:
                head.gradient(log_z_2N[:, rows], weights_N[rows])
            else:
                head.gradient(log_z_2N[:, rows], weights_N[rows], entropy_N[rows], entropy_weights_N[rows])
            head.backward(rows, grad_hidden_Nh, grad_weight_vh)
        if grad_hidden_Nh is not None:
            grad_hidden_Nh = reduce_rows(grad_hidden_Nh, ctx.group, ctx.sequence_parallel)
        if grad_weight_vh is not None:
            grad_weight_vh = deliver_weight_gradient(weight_vh, grad_weight_vh, ctx.main_grad)
        return grad_hidden_Nh, grad_weight_vh, *(None,) * (3 + len(ctx.options))


def linear_logprob(
    hidden_Nh: torch.Tensor,
    weight_vh: torch.Tensor,
    targets_N: torch.Tensor,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    valid_vocab: int | None = None,
    chunk_size: int | None = None,
    sequence_parallel: bool = False,
    gradient_accumulation_fusion: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`vocab_parallel_logprob(hidden weightᵀ, targets, temperature)` without the [N, V/p] logits.

    log p = log softmax(W h / temperature) at the target, H = -Σ p log p, both in nats. A backward pass computes the
    logits again, chunk by chunk: four GEMMs instead of three, for memory of one chunk instead of N tokens.

    Args:
        hidden_Nh: [N, h] in the weight's dtype, the same on every rank; with sequence parallelism this rank's N/p
            rows of them, in rank order (Megatron splits the sequence, so rows count sequence first: [S/p, B, h]).
        weight_vh: [V/p, h] fp32, bf16 or fp16; rank r holds rows r V/p to (r + 1) V/p, tied to the embedding or not.
        targets_N: [N] int64, global token ids below `valid_vocab`, all N on every rank.
        temperature: > 0.
        group: tensor-parallel group (None: the whole vocabulary is here).
        valid_vocab: global rows of the weight from this one on are padding of probability 0 (None: none are).
        chunk_size: tokens at a time (None: logits of 2^24 elements on CPU, 2^28 on a GPU).
        sequence_parallel: gather the hidden states, and reduce-scatter their gradient instead of all-reducing it.
        gradient_accumulation_fusion: add the weight's gradient to `weight_vh.main_grad`, where that exists, as
            Megatron-Core's ColumnParallelLinear does.

    Returns:
        log-probabilities [N] and entropies [N], fp32, the same on every rank, both differentiable with respect to
        hidden states and weight. Logits are rounded to the weight's dtype, as the output layer would round them, and
        everything after that is fp32: in fp32 the results differ from a float64 reference by a few units of 2^-23 of
        the largest |logit|. The gradient of the logits is rounded to the weight's dtype once more for the hidden
        states' GEMM; the weight's gradient is summed over tokens in fp32. On CPU, tokens with an upstream gradient of
        0 cost nothing in the backward pass. One collective forward (4 floats a token and rank), one backward.
    """
    return _LinearLogProb.apply(
        hidden_Nh, weight_vh, targets_N, sequence_parallel, gradient_accumulation_fusion,
        temperature, group, valid_vocab, chunk_size,
    )  # fmt: skip
