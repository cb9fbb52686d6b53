"""The PPO-Lag actor loss and its gradient straight from hidden states: three GEMMs, one chunk of logits at a time.

Legend: N tokens, n of them in a chunk, h hidden size, V/p of the vocabulary on each of p tensor-parallel ranks (`v`).
"""

import torch
import torch.distributed as dist

from .linear_logprob import (
    ChunkedHead,
    combine_statistics,
    deliver_weight_gradient,
    gather_rows,
    main_grad_of,
    new_weight_gradient,
    reduce_rows,
)
from .ppo_lag_loss import surrogate_loss


def _loss_gradient(log_probs_n: torch.Tensor, *rest) -> torch.Tensor:
    """d loss / d log p of each token, [n]."""
    with torch.enable_grad():
        log_probs_n = log_probs_n.detach().requires_grad_()
        loss, _ = surrogate_loss(log_probs_n, torch.zeros_like(log_probs_n), *rest)
    return torch.autograd.grad(loss, log_probs_n)[0]


class _LinearPpoLagLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight_vh, targets_N, per_token, scalars, with_gradient, sequence_parallel, fusion,
        temperature, group, *chunking,
    ):  # fmt: skip
        hidden_Nh = gather_rows(hidden, group, sequence_parallel)
        grad_hidden_Nh = grad_weight_vh = None
        if with_gradient and hidden.requires_grad:
            grad_hidden_Nh = torch.zeros_like(hidden_Nh)
        if with_gradient and weight_vh.requires_grad:
            # Never `main_grad` itself: the upstream gradient that scales this is not known before the backward pass.
            grad_weight_vh = new_weight_gradient(weight_vh, None)
        head = ChunkedHead(hidden_Nh, weight_vh, targets_N, temperature, group, *chunking)
        # Tokens that no chunk visits are outside the mask, where `surrogate_loss` reads neither.
        log_probs_N, entropy_N = torch.zeros(2, len(targets_N), dtype=torch.float32, device=hidden.device).unbind()
        for rows in head.chunks(per_token[3]):
            head.load(rows)
            local_n4 = head.statistics()
            log_probs_n, entropy_n, log_z_2n = combine_statistics(local_n4, group)
            log_probs_N[rows], entropy_N[rows] = log_probs_n, entropy_n
            if grad_hidden_Nh is not None or grad_weight_vh is not None:
                gradient_n = _loss_gradient(log_probs_n, *(tensor_N[rows] for tensor_N in per_token), *scalars)
                head.gradient(log_z_2n, gradient_n)
                head.backward(rows, grad_hidden_Nh, grad_weight_vh)
        loss, statistics_4 = surrogate_loss(log_probs_N, entropy_N, *per_token, *scalars)
        ctx.mark_non_differentiable(statistics_4)
        ctx.save_for_backward(weight_vh)
        ctx.gradients = grad_hidden_Nh, grad_weight_vh
        ctx.group, ctx.sequence_parallel, ctx.main_grad = group, sequence_parallel, main_grad_of(weight_vh, fusion)
        ctx.others = 8 + len(chunking)
        return loss, statistics_4

    @staticmethod
    def backward(ctx, upstream, _):
        if ctx.gradients is None:
            raise RuntimeError("linear_ppo_lag_loss: its gradients are used up by the first backward pass")
        (weight_vh,), (grad_hidden_Nh, grad_weight_vh) = ctx.saved_tensors, ctx.gradients
        ctx.gradients = None
        if grad_hidden_Nh is not None:
            grad_hidden_Nh = reduce_rows(grad_hidden_Nh.mul_(upstream), ctx.group, ctx.sequence_parallel)
        if grad_weight_vh is not None:
            grad_weight_vh = deliver_weight_gradient(weight_vh, grad_weight_vh.mul_(upstream), ctx.main_grad)
        return grad_hidden_Nh, grad_weight_vh, *(None,) * ctx.others


def linear_ppo_lag_loss(
    hidden_Nh: torch.Tensor,
    weight_vh: torch.Tensor,
    targets_N: torch.Tensor,
    old_log_probs_N: torch.Tensor,
    reward_advantages_N: torch.Tensor,
    cost_advantages_N: torch.Tensor,
    mask_N: torch.Tensor,
    weights_N: torch.Tensor,
    lam: torch.Tensor,
    clip_ratio: float,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    advantage_mean: torch.Tensor | None = None,
    advantage_rstd: torch.Tensor | None = None,
    valid_vocab: int | None = None,
    chunk_size: int | None = None,
    sequence_parallel: bool = False,
    gradient_accumulation_fusion: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ppo_lag_loss(hidden weightᵀ, ...)` without the [N, V/p] logits: its equation, `linear_logprob`'s log p.

    The loss is a scalar, so each chunk's gradient is made while its logits are there (three GEMMs, as without chunks),
    and the backward pass only scales it by the upstream gradient.

    Args:
        hidden_Nh, weight_vh, targets_N, temperature, group, valid_vocab, chunk_size, sequence_parallel,
            gradient_accumulation_fusion: as in `linear_logprob`.
        old_log_probs_N, reward_advantages_N, cost_advantages_N, mask_N, weights_N, lam, clip_ratio, advantage_mean,
            advantage_rstd: as in `ppo_lag_loss`, all N tokens on every rank.

    Returns:
        the loss, 0-d fp32, which can be differentiated once, with respect to hidden states and weight; and the sums of
        `ppo_lag_loss.STATISTICS`, [4] fp64. The same on every rank. Nothing waits for a GPU.

    Between the passes it holds the gradients of the hidden states, in their dtype, and of the weight, in fp32; the
    latter is added to `main_grad` once scaled. Roundings are those of `linear_logprob`. fp16 gradients may underflow: a
    loss scale would come after they are made. On CPU, tokens outside the mask cost nothing. One collective a chunk
    forward (4 floats a token and rank), one backward.
    """
    if (advantage_mean is None) != (advantage_rstd is None):
        raise ValueError("advantage_mean and advantage_rstd go together: give both or neither")
    per_token = (old_log_probs_N, reward_advantages_N, cost_advantages_N, mask_N, weights_N)
    scalars = (lam, clip_ratio, advantage_mean, advantage_rstd)
    return _LinearPpoLagLoss.apply(
        hidden_Nh, weight_vh, targets_N, per_token, scalars, torch.is_grad_enabled(), sequence_parallel,
        gradient_accumulation_fusion, temperature, group, valid_vocab, chunk_size,
    )  # fmt: skip
