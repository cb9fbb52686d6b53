"""The critics' clipped value loss and its gradient in one pass.

Legend: B sequences; T actions. The operation is elementwise: any shape will do for all four tensors together.
"""

import torch

from .backend import tl, triton, use_triton


def value_loss(
    values_BT: torch.Tensor,
    old_values_BT: torch.Tensor,
    returns_BT: torch.Tensor,
    weights_BT: torch.Tensor,
    clip_value: float,
) -> torch.Tensor:
    """Σ w · ½ max((V - G)², (clip(V, V_old ± clip_value) - G)²), the authors' critic loss (PPO's value clipping).

    The weights are the mask and the reduction in one: 1 / (its row's actions x global sequences) for the mean over
    sequences, 1 / (global actions) for the mean over tokens. Where w is 0, loss and gradient are 0 whatever the other
    tensors hold there, NaN included.

    Args:
        values_BT: fp32, bf16 or fp16, any strides, with gradient.
        old_values_BT, returns_BT: V_old and G, floating, constants.
        weights_BT: floating, >= 0, constant.
        clip_value: >= 0.

    Returns:
        The loss, 0-d fp32. Arithmetic is fp32, the sum too (blocks first, so its rounding is that of a pairwise sum);
        the gradient is fp32 until it has been multiplied by the incoming one, then rounded to values' dtype. Where
        both squares are equal (V inside the clip range) it is w (V - G). Two runs are bitwise equal.

    Raises ValueError if the four shapes differ.
    """
    shapes = [tuple(x.shape) for x in (values_BT, old_values_BT, returns_BT, weights_BT)]
    if len(set(shapes)) > 1:
        raise ValueError(f"value_loss: expected four tensors of one shape, found {shapes}")
    return _ValueLoss.apply(values_BT, old_values_BT, returns_BT, weights_BT, clip_value)


class _ValueLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, old_values, returns, weights, clip_value):
        path = _triton if use_triton(values) and values.numel() > 0 else _torch
        loss, gradient = path(values, old_values, returns, weights, clip_value)
        ctx.save_for_backward(gradient)
        ctx.dtype = values.dtype
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_loss).to(ctx.dtype), None, None, None, None


def _torch(values, old_values, returns, weights, clip_value):
    v, old, target, w = values.float(), old_values.float(), returns.float(), weights.float()
    gradient = v - target
    clipped_error = torch.minimum(torch.maximum(v, old - clip_value), old + clip_value).sub_(target)
    squares, clipped_squares = gradient.square(), clipped_error.square_()
    counted = w != 0
    # Where the clipped square is the larger one the clip is active: it does not depend on V.
    kept = counted & ~(squares < clipped_squares)
    gradient = _only(kept, gradient.mul_(w))
    loss = _only(counted, torch.maximum(squares, clipped_squares).mul_(w)).sum() * 0.5
    return loss, gradient


def _only(kept: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """torch.where(kept, x, 0) in place on fp32; & with all ones or none is ten times as fast on a CPU."""
    x.view(torch.int32).bitwise_and_(kept.to(torch.int32).neg_())
    return x


@triton.jit
def _value_loss_kernel(
    values, old_values, returns, weights, gradients, partial_losses, size, clip_value, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    v = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
    old = tl.load(old_values + at, mask=inside, other=0.0).to(tl.float32)
    target = tl.load(returns + at, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weights + at, mask=inside, other=0.0).to(tl.float32)
    error = v - target
    clipped_error = tl.minimum(tl.maximum(v, old - clip_value), old + clip_value) - target
    squares, clipped_squares = error * error, clipped_error * clipped_error
    counted = weight != 0.0
    loss = tl.where(counted, 0.5 * weight * tl.maximum(squares, clipped_squares), 0.0)
    gradient = tl.where(counted & ((squares < clipped_squares) == 0), weight * error, 0.0)
    tl.store(gradients + at, gradient, mask=inside)
    # A partial sum per program instead of an atomic: the same bits in every run.
    tl.store(partial_losses + tl.program_id(0), tl.sum(loss))


def _triton(values, old_values, returns, weights, clip_value):
    size, block = values.numel(), 2048
    blocks = triton.cdiv(size, block)
    gradient = torch.empty(values.shape, dtype=torch.float32, device=values.device)
    partial_losses = torch.empty(blocks, dtype=torch.float32, device=values.device)
    _value_loss_kernel[(blocks,)](
        values.contiguous(), old_values.contiguous(), returns.contiguous(), weights.contiguous(), gradient,
        partial_losses, size, float(clip_value), BLOCK=block, num_warps=8,
    )  # fmt: skip
    return partial_losses.sum(), gradient
