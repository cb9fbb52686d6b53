"""The Lagrange multiplier's step on the device: λ and its window of episode costs never visit the host.

Legend: B episodes on this data-parallel rank; N = dp x B in the global batch; W the window.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist

from .backend import tl, triton, use_triton


class LagrangeState(NamedTuple):
    """λ, the last W episode costs and how many there have been; `lagrange_step` updates all three in place.

    lambda_1: [1] fp64. costs_W: [W] fp64, a ring: episode number i (from 0) lies at i % W. episodes_1: [1] int64, the
    number of episodes so far; the ring's first min(episodes, W) places are filled.
    """

    lambda_1: torch.Tensor
    costs_W: torch.Tensor
    episodes_1: torch.Tensor


def lagrange_state(lambda_init: float, window: int, device: torch.device | str) -> LagrangeState:
    """The state before the first episode."""
    return LagrangeState(
        torch.full((1,), float(lambda_init), dtype=torch.float64, device=device),
        torch.zeros(window, dtype=torch.float64, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
    )


@torch.no_grad()
def lagrange_step(
    state: LagrangeState,
    episode_costs_B: torch.Tensor,
    counted_B: torch.Tensor | None,
    update: bool,
    lambda_lr: float,
    threshold: float,
    lambda_min: float,
    lambda_max: float,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Observe a rollout batch's episode costs, then ln λ ← ln λ + α λ (J_C - threshold) (Safe RLHF, appendix B).

    J_C is the mean of the last W episode costs; λ is kept in [lambda_min, lambda_max]. All arithmetic is fp64; the last
    bits of J_C depend on where in the ring the costs lie, and on the path. Bitwise the same for every number of ranks:
    the costs enter the ring in the order of the global batch.

    Args:
        state: updated in place, on this rank; all ranks hold the same.
        episode_costs_B: [B] floating, the rows `rank::size` of the global batch, as many on every rank.
        counted_B: [B] bool, the episodes that count (None: all). A cost that is not finite never counts: on the device
            there is no raising, and one would poison λ for good.
        update: False while the step is below the update delay: the costs are observed and λ stays.
        lambda_lr, threshold, lambda_min, lambda_max: α, and the bounds; 0 < lambda_min <= lambda_max.
        group: data-parallel group (None: one rank). One all-gather of 8 B bytes a rank; nothing waits for the device.

    Returns:
        J_C, [1] fp64 on the device; NaN before the first counted episode.
    """
    costs_B = episode_costs_B.double()
    if counted_B is not None:
        costs_B = costs_B.masked_fill(~counted_B, math.nan)
    costs_N = costs_B
    if group is not None and group.size() > 1:
        parts = [torch.empty_like(costs_B) for _ in range(group.size())]
        dist.all_gather(parts, costs_B.contiguous(), group=group)
        costs_N = torch.stack(parts, dim=1).flatten()
    path = _triton if use_triton(costs_N) else _torch
    return path(state, costs_N, update, lambda_lr, threshold, lambda_min, lambda_max)


def _torch(state, costs_N, update, lambda_lr, threshold, lambda_min, lambda_max):
    lambda_1, costs_W, episodes_1 = state
    window = costs_W.size(0)
    counted_N = costs_N.isfinite()
    costs_N = costs_N.masked_fill(~counted_N, 0.0)
    number_N = counted_N.cumsum(0)  # 1, 2, ... among the counted
    new_1 = number_N[-1:] if costs_N.numel() else torch.zeros_like(episodes_1)
    kept_N = counted_N & (number_N > new_1 - window)
    # What is not kept lands on a place behind the ring.
    place_N = torch.where(kept_N, (episodes_1 + number_N - 1) % window, window)
    ring = torch.cat([costs_W, costs_W.new_zeros(1)]).scatter_(0, place_N, costs_N)
    costs_W.copy_(ring[:window])
    episodes_1.add_(new_1)
    mean_1 = costs_W.sum() / episodes_1.clamp(max=window)  # 0 / 0 is the NaN of no episodes
    if update:
        log_step_1 = lambda_lr * lambda_1 * (mean_1 - threshold)
        stepped_1 = (lambda_1 * log_step_1.clamp(max=700.0).exp()).clamp(lambda_min, lambda_max)
        lambda_1.copy_(torch.where(episodes_1 > 0, stepped_1, lambda_1))
    return mean_1


@triton.jit
def _lagrangian_kernel(
    lambda_1, costs_W, episodes_1, costs_N, mean_1, N, W,
    # fp64 settings of a run: as arguments they would be rounded to fp32.
    UPDATE: tl.constexpr, LAMBDA_LR: tl.constexpr, THRESHOLD: tl.constexpr,
    LAMBDA_MIN: tl.constexpr, LAMBDA_MAX: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    n, w = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_W)
    cost = tl.load(costs_N + n, mask=n < N, other=0.0)
    before = tl.load(episodes_1)
    lambda_ = tl.load(lambda_1)
    ring = tl.load(costs_W + w, mask=w < W, other=0.0)

    counted = (n < N) & (tl.abs(cost) < float("inf"))  # False for NaN
    number = tl.cumsum(counted.to(tl.int64), 0)  # 1, 2, ... among the counted
    new = tl.sum(counted.to(tl.int64))
    kept = counted & (number > new - W)
    place = (before + number - 1) % W

    # The mean is taken over what the ring is going to hold, so that nothing is read back after it was written.
    since = (w - before % W + W) % W  # how long after the first new cost a place is written to
    stays = (w < tl.minimum(before, W)) & (since >= new)
    total = tl.sum(tl.where(stays, ring, 0.0)) + tl.sum(tl.where(kept, cost, 0.0))
    episodes = before + new
    filled = tl.minimum(episodes, W)
    mean = tl.where(filled > 0, total / tl.maximum(filled, 1).to(tl.float64), float("nan"))

    tl.debug_barrier()  # all warps have read the state
    tl.store(costs_W + place, cost, mask=kept)
    tl.store(episodes_1, episodes)
    tl.store(mean_1, mean)
    if UPDATE:
        log_step = tl.minimum(LAMBDA_LR * lambda_ * (mean - THRESHOLD), 700.0)
        floor, ceiling = tl.full([], LAMBDA_MIN, tl.float64), tl.full([], LAMBDA_MAX, tl.float64)
        stepped = tl.minimum(tl.maximum(lambda_ * tl.exp(log_step), floor), ceiling)
        tl.store(lambda_1, tl.where(filled > 0, stepped, lambda_))


def _triton(state, costs_N, update, lambda_lr, threshold, lambda_min, lambda_max):
    lambda_1, costs_W, episodes_1 = state
    mean_1 = torch.empty(1, dtype=torch.float64, device=lambda_1.device)
    _lagrangian_kernel[(1,)](
        lambda_1, costs_W, episodes_1, costs_N.contiguous(), mean_1, costs_N.numel(), costs_W.numel(),
        UPDATE=bool(update), LAMBDA_LR=float(lambda_lr), THRESHOLD=float(threshold), LAMBDA_MIN=float(lambda_min),
        LAMBDA_MAX=float(lambda_max), BLOCK_N=triton.next_power_of_2(max(costs_N.numel(), 1)),
        BLOCK_W=triton.next_power_of_2(costs_W.numel()),
    )  # fmt: skip
    return mean_1
