"""Log-probability and entropy of tokens from vocabulary shards, without gathering the vocabulary.

Legend: N tokens, V vocabulary, V/p of it on each of p tensor-parallel ranks (`logits_Nv`).
"""

import torch
import torch.distributed as dist


def combine_shards(local_N4: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Statistics of every rank, [p, N, 4], through one all-gather (p = 1: no collective)."""
    if group is None or group.size() == 1:
        return local_N4.unsqueeze(0)
    gathered_pN4 = local_N4.new_empty(group.size(), *local_N4.shape)
    dist.all_gather(list(gathered_pN4.unbind(0)), local_N4.contiguous(), group=group)
    return gathered_pN4


def scaled_logits(logits_Nv: torch.Tensor, temperature: float) -> torch.Tensor:
    """logits / temperature, fp32, not below -1e30.

    A padded row's finfo.min has probability 0, but 0 * inf would be NaN: divided by a temperature below 1, or summed
    over a shard of nothing but padding, it must stay finite.
    """
    return (logits_Nv.float() / temperature).clamp_(min=-1e30)


class _VocabParallelLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_Nv, targets_N, temperature, group):
        rank = 0 if group is None else group.rank()
        shard = logits_Nv.size(1)
        z_Nv = scaled_logits(logits_Nv, temperature)
        max_N = z_Nv.max(dim=1).values
        # Everything below is relative to the maximum: at |z| = 1e4 an absolute log Z would cost three digits.
        shifted_Nv = z_Nv - max_N[:, None]
        exp_Nv = shifted_Nv.exp()
        sum_N = exp_Nv.sum(dim=1)
        weighted_N = (exp_Nv * shifted_Nv).sum(dim=1)
        local_N = targets_N - rank * shard
        inside_N = (local_N >= 0) & (local_N < shard)
        local_N = local_N.clamp(0, shard - 1)
        target_N = torch.where(inside_N, z_Nv.gather(1, local_N[:, None])[:, 0], 0.0)

        stats_pN4 = combine_shards(torch.stack([max_N, sum_N, target_N, weighted_N], dim=1), group)
        global_max_N = stats_pN4[..., 0].max(dim=0).values
        scale_pN = (stats_pN4[..., 0] - global_max_N).exp()
        sums_pN = stats_pN4[..., 1] * scale_pN
        global_sum_N = sums_pN.sum(dim=0)
        log_sum_N = global_sum_N.log()
        weighted_pN = stats_pN4[..., 3] * scale_pN + (stats_pN4[..., 0] - global_max_N) * sums_pN
        entropy_N = log_sum_N - weighted_pN.sum(dim=0) / global_sum_N
        log_probs_N = (stats_pN4[..., 2].sum(dim=0) - global_max_N) - log_sum_N

        ctx.save_for_backward(logits_Nv, local_N, inside_N, global_max_N, log_sum_N, entropy_N)
        ctx.temperature = temperature
        return log_probs_N, entropy_N

    @staticmethod
    def backward(ctx, grad_log_probs_N, grad_entropy_N):
        logits_Nv, local_N, inside_N, max_N, log_sum_N, entropy_N = ctx.saved_tensors
        log_p_Nv = (scaled_logits(logits_Nv, ctx.temperature) - max_N[:, None]) - log_sum_N[:, None]
        p_Nv = log_p_Nv.exp()
        # d log p_target / dz = 1[target] - p;  dH / dz = -p (log p + H)
        grad_Nv = p_Nv * -(grad_log_probs_N[:, None] + grad_entropy_N[:, None] * (log_p_Nv + entropy_N[:, None]))
        grad_Nv.scatter_add_(1, local_N[:, None], (grad_log_probs_N * inside_N)[:, None])
        return (grad_Nv / ctx.temperature).to(logits_Nv.dtype), None, None, None


def vocab_parallel_logprob(
    logits_Nv: torch.Tensor,
    targets_N: torch.Tensor,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax(z / temperature) at the target, and the entropy of that distribution, in nats.

    Args:
        logits_Nv: [N, V/p] fp32, bf16 or fp16; rank r holds columns r V/p to (r + 1) V/p.
        targets_N: [N] int64, global token ids.
        temperature: > 0.
        group: tensor-parallel group (None: the whole vocabulary is here).

    Returns:
        log-probabilities [N] and entropies [N], fp32, the same on every rank. Both are differentiable; sums
        accumulate in fp32. One collective forward (4 floats a token and rank), none backward.
    """
    return _VocabParallelLogProb.apply(logits_Nv, targets_N, temperature, group)
