"""From per-answer scores to per-token advantages and returns, for reward and cost, in one pass over the batch.

Legend: B sequences; T actions. Column t holds what belongs to predicting token t + 1; mask_BT is True where token t + 1
is a sampled response token, in one contiguous run per row (possibly empty).
"""

import math
from typing import NamedTuple

import torch

from .backend import tl, triton, use_triton

SLICE_ELEMENTS = 1 << 18  # one MiB of fp32: what the CPU path works on at a time


class ShapedGae(NamedTuple):
    """Advantages Â and critics' targets Â + V, [B, T] fp32, zero outside the mask; and sums for whitening.

    sums_6: [6] fp64, over the masked tokens: their number, Σ Â_r, Σ Â_c, Σ Â_r², Σ Â_c², Σ Â_r Â_c. They add up over
    ranks, and because the mix is linear they hold the moments of (Â_r - λ Â_c) / (1 + λ) for every λ (`mixed_moments`).
    """

    reward_advantages_BT: torch.Tensor
    cost_advantages_BT: torch.Tensor
    reward_returns_BT: torch.Tensor
    cost_returns_BT: torch.Tensor
    sums_6: torch.Tensor


@torch.no_grad()
def shaped_gae(
    log_probs_BT: torch.Tensor,
    ref_log_probs_BT: torch.Tensor,
    rewards_B: torch.Tensor,
    costs_B: torch.Tensor,
    reward_values_BT: torch.Tensor,
    cost_values_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    kl_coeff: float,
    score_clip: float,
    gamma: float,
    lam: float,
) -> ShapedGae:
    """KL-shaped token rewards and costs (Safe RLHF, appendix B) and generalised advantages (Schulman et al., 2016).

        k_t = log π_θ - log π_ref
        r_t = clip(-β k_t + R [t last], ±score_clip)        c_t = clip(+β k_t + C [t last], ±score_clip)
        δ_t = r_t + γ V_r(s_{t+1}) - V_r(s_t)               likewise with c_t and V_c
        Â_t = δ_t + γ λ_GAE Â_{t+1}                         return_t = Â_t + V(s_t)

    V and Â after the last masked column are 0 (the answer ends there, also when it was cut). What the inputs hold
    outside the mask is ignored, NaN included. Constants for the losses: no gradient passes.

    Args:
        log_probs_BT, ref_log_probs_BT, reward_values_BT, cost_values_BT: [B, T] fp32, bf16 or fp16, any strides.
        rewards_B, costs_B: [B] floating, the episode scores R and C.
        mask_BT: [B, T] bool, one contiguous run of True per row; another pattern gives wrong numbers, not an error.
        kl_coeff, score_clip: β, and the bound on token rewards and costs, both >= 0.
        gamma, lam: γ and λ_GAE, in [0, 1].

    Returns:
        ShapedGae. Arithmetic is fp32; the sums are fp32 within a row and fp64 over rows. The recursion is evaluated as
        a scan in Triton and in blocks in PyTorch; both differ from the loop over t by the order of additions, by at
        most about 1e-6 x Σ_k (γ λ_GAE)^k |δ_{t+k}|. Two runs are bitwise equal. There is no limit on T.

    Raises ValueError for shapes that do not fit together and for gamma or lam outside [0, 1].
    """
    shape = mask_BT.shape
    per_token = (log_probs_BT, ref_log_probs_BT, reward_values_BT, cost_values_BT)
    if mask_BT.dim() != 2 or any(x.shape != shape for x in per_token):
        shapes = [tuple(x.shape) for x in (*per_token, mask_BT)]
        raise ValueError(f"shaped_gae: expected five tensors of one shape [B, T], found {shapes}")
    if rewards_B.shape != shape[:1] or costs_B.shape != shape[:1]:
        raise ValueError(f"shaped_gae: expected scores [{shape[0]}], found {[*rewards_B.shape]} and {[*costs_B.shape]}")
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"shaped_gae: gamma and lam must be in [0, 1], found {gamma} and {lam}")
    path = _triton if use_triton(mask_BT) and mask_BT.numel() > 0 else _torch
    return path(*per_token, rewards_B, costs_B, mask_BT, kl_coeff, score_clip, gamma, lam)


def mixed_moments(sums_6: torch.Tensor, lambda_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of Â = (Â_r - λ Â_c) / (1 + λ) over the tokens behind `sums_6`; 0-d fp64, on the device.

    lambda_: λ, 0-d or one element. No token gives mean 0, variance 0; rounding below 0 counts as 0.
    """
    count, r, c, rr, cc, rc = sums_6.double().unbind()
    lambda_ = lambda_.double().reshape(())
    count = count.clamp(min=1)
    mean = (r - lambda_ * c) / (1 + lambda_) / count
    square = (rr - 2 * lambda_ * rc + lambda_.square() * cc) / (1 + lambda_).square() / count
    return mean, (square - mean.square()).clamp(min=0)


@triton.jit
def _linear_recurrence(a1, r1, c1, a2, r2, c2):
    # x -> a x + b, the later column (first argument, in a reverse scan) applied before the earlier one; one `a`, two b.
    return a1 * a2, r1 * a2 + r2, c1 * a2 + c2


@triton.jit
def _shaped_gae_kernel(
    log_probs, ref_log_probs, reward_values, cost_values, rewards, costs, mask,
    reward_advantages, cost_advantages, reward_returns, cost_returns, row_sums,
    T, kl_coeff, score_clip, gamma, decay,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start_of_row = row * T
    reward = tl.load(rewards + row).to(tl.float32)
    cost = tl.load(costs + row).to(tl.float32)
    offsets = tl.arange(0, BLOCK)
    next_r, next_c = 0.0, 0.0  # both advantages at the first column of the block after this one
    count, sum_r, sum_c, sum_rr, sum_cc, sum_rc = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    blocks = tl.cdiv(T, BLOCK)
    for i in range(blocks):
        t = (blocks - 1 - i) * BLOCK + offsets
        inside = t < T
        at = start_of_row + t
        has_next = t + 1 < T
        # No load waits for another: the mask is applied to what arrived, not to the request.
        here = tl.load(mask + at, mask=inside, other=0) != 0
        after = tl.load(mask + at + 1, mask=has_next, other=0) != 0
        log_prob = tl.load(log_probs + at, mask=inside, other=0.0).to(tl.float32)
        ref_log_prob = tl.load(ref_log_probs + at, mask=inside, other=0.0).to(tl.float32)
        v_r = tl.load(reward_values + at, mask=inside, other=0.0).to(tl.float32)
        v_c = tl.load(cost_values + at, mask=inside, other=0.0).to(tl.float32)
        next_v_r = tl.load(reward_values + at + 1, mask=has_next, other=0.0).to(tl.float32)
        next_v_c = tl.load(cost_values + at + 1, mask=has_next, other=0.0).to(tl.float32)

        v_r, v_c = tl.where(here, v_r, 0.0), tl.where(here, v_c, 0.0)
        next_v_r, next_v_c = tl.where(after, next_v_r, 0.0), tl.where(after, next_v_c, 0.0)
        penalty = kl_coeff * (log_prob - ref_log_prob)
        last = here & (after == 0)
        r = tl.where(last, reward, 0.0) - penalty
        c = tl.where(last, cost, 0.0) + penalty
        r = tl.minimum(tl.maximum(r, -score_clip), score_clip)
        c = tl.minimum(tl.maximum(c, -score_clip), score_clip)
        delta_r = tl.where(here, r + gamma * next_v_r - v_r, 0.0)
        delta_c = tl.where(here, c + gamma * next_v_c - v_c, 0.0)

        a = tl.where(here, decay, 0.0)
        a, adv_r, adv_c = tl.associative_scan((a, delta_r, delta_c), 0, _linear_recurrence, reverse=True)
        adv_r += a * next_r
        adv_c += a * next_c
        next_r = tl.sum(tl.where(offsets == 0, adv_r, 0.0))
        next_c = tl.sum(tl.where(offsets == 0, adv_c, 0.0))

        tl.store(reward_advantages + at, adv_r, mask=inside)
        tl.store(cost_advantages + at, adv_c, mask=inside)
        tl.store(reward_returns + at, adv_r + v_r, mask=inside)
        tl.store(cost_returns + at, adv_c + v_c, mask=inside)
        count += tl.sum(here.to(tl.float32))
        sum_r += tl.sum(adv_r)
        sum_c += tl.sum(adv_c)
        sum_rr += tl.sum(adv_r * adv_r)
        sum_cc += tl.sum(adv_c * adv_c)
        sum_rc += tl.sum(adv_r * adv_c)
    # Six stores instead of atomics: the sum over rows must not depend on which program finishes first.
    row_sums += row * 6
    tl.store(row_sums, count)
    tl.store(row_sums + 1, sum_r)
    tl.store(row_sums + 2, sum_c)
    tl.store(row_sums + 3, sum_rr)
    tl.store(row_sums + 4, sum_cc)
    tl.store(row_sums + 5, sum_rc)


def _triton(
    log_probs_BT, ref_log_probs_BT, reward_values_BT, cost_values_BT, rewards_B, costs_B, mask_BT,
    kl_coeff, score_clip, gamma, lam,
):  # fmt: skip
    rows, columns = mask_BT.shape
    inputs = (log_probs_BT, ref_log_probs_BT, reward_values_BT, cost_values_BT, rewards_B, costs_B)
    inputs = [x.contiguous() for x in inputs]
    outputs = [torch.empty(mask_BT.shape, dtype=torch.float32, device=mask_BT.device) for _ in range(4)]
    row_sums_B6 = torch.empty(rows, 6, dtype=torch.float32, device=mask_BT.device)
    # 8 columns a thread keep the two dozen live arrays of a block in registers.
    block = min(triton.next_power_of_2(columns), 2048)
    _shaped_gae_kernel[(rows,)](
        *inputs, mask_BT.contiguous().view(torch.uint8), *outputs, row_sums_B6,
        columns, float(kl_coeff), float(score_clip), float(gamma), float(gamma * lam),
        BLOCK=block, num_warps=max(1, min(8, block // 256)),
    )  # fmt: skip
    return ShapedGae(*outputs, row_sums_B6.double().sum(dim=0))


def _torch(
    log_probs_BT, ref_log_probs_BT, reward_values_BT, cost_values_BT, rewards_B, costs_B, mask_BT,
    kl_coeff, score_clip, gamma, lam,
):  # fmt: skip
    rows, columns = mask_BT.shape
    device = mask_BT.device
    outputs_4BT = torch.empty(4, rows, columns, dtype=torch.float32, device=device)
    if mask_BT.numel() == 0:
        return ShapedGae(*outputs_4BT.unbind(), torch.zeros(6, dtype=torch.float64, device=device))

    # The columns that all rows share need no masking: only the margins on both sides of them (everything, if there are
    # none) do. On a CPU the time is that of passing over [B, T], so that each pass spared counts.
    shared = mask_BT.view(torch.uint8).amin(0).nonzero()
    before, after = (int(shared[0]), int(shared[-1]) + 1) if len(shared) else (0, 0)
    margins = [slice(*ends) for ends in ((0, before), (after, columns)) if ends[0] < ends[1]]

    # Each row's last token gets the score. `minus` is -δ, which spares a pass below; the scan turns the sign.
    tail = max(after - 1, 0)  # no row ends before the shared columns do
    tail_ends = torch.arange(tail + 1, columns + 1, dtype=torch.int32, device=device)
    ends_B1 = (mask_BT[:, tail:] * tail_ends).amax(1, keepdim=True)
    last_B1 = (ends_B1 - 1).clamp_(min=0).long()  # an empty row takes its own column 0, which is masked below
    values_2B1 = torch.stack([values_BT.gather(1, last_B1).float() for values_BT in (reward_values_BT, cost_values_BT)])
    penalty_B1 = kl_coeff * (log_probs_BT.gather(1, last_B1).float() - ref_log_probs_BT.gather(1, last_B1).float())
    final_2B1 = torch.stack([rewards_B.float()[:, None] - penalty_B1, costs_B.float()[:, None] + penalty_B1])
    minus_last_2B1 = values_2B1 - final_2B1.clamp_(-score_clip, score_clip)

    scan = _BlockScan(columns, gamma * lam, device)
    # On a CPU a slice of rows goes through all its steps while the cache still holds it.
    step = rows if mask_BT.is_cuda else min(rows, max(1, SLICE_ELEMENTS // columns))
    scratch_5bT = torch.empty(5, step, scan.padded, dtype=torch.float32, device=device)
    scratch_5bT[:2, :, columns:] = 0.0  # nothing follows the last column
    row_sums_2B = torch.empty(2, rows, dtype=torch.float32, device=device)
    row_products_B22 = torch.empty(rows, 2, 2, dtype=torch.float32, device=device)
    for first in range(0, rows, step):
        part, size = slice(first, first + step), min(step, rows - first)
        values_2 = reward_values_BT[part].float(), cost_values_BT[part].float()
        keep_bT = scratch_5bT[4, :size, :columns].view(torch.int32)
        for margin in margins:
            keep_bT[:, margin].copy_(mask_BT[part, margin]).neg_()

        outputs_4bT = outputs_4BT[:, part]
        kl_bT = outputs_4bT[0]  # a place not yet in use
        torch.sub(log_probs_BT[part].float(), ref_log_probs_BT[part].float(), out=kl_bT)
        if kl_coeff > 0:
            kl_bT.clamp_(-score_clip / kl_coeff, score_clip / kl_coeff)
        minus_2bT = scratch_5bT[:2, :size]
        for values_bT, minus_bT, sign in zip(values_2, minus_2bT, (1, -1), strict=True):
            torch.add(values_bT, kl_bT, alpha=sign * kl_coeff, out=minus_bT[:, :columns])
            minus_bT[:, : columns - 1].sub_(values_bT[:, 1:], alpha=gamma)
        minus_2bT.scatter_(2, last_B1[part].expand(2, size, 1), minus_last_2B1[:, part])
        _mask(minus_2bT, keep_bT, margins)

        # Columns before the mask receive nonsense, which reaches no column inside it; those after it hold only zeros.
        advantages_2bT = scan(minus_2bT, scratch_5bT[2:4, :size])[:, :, :columns]
        _mask(advantages_2bT, keep_bT, margins)
        outputs_4bT[:2] = advantages_2bT
        for values_bT, advantages_bT, returns_bT in zip(values_2, advantages_2bT, outputs_4bT[2:], strict=True):
            torch.add(advantages_bT, values_bT, out=returns_bT)
        _mask(outputs_4bT[2:], keep_bT, margins)
        torch.sum(advantages_2bT, dim=2, out=row_sums_2B[:, part])
        torch.bmm(advantages_2bT.transpose(0, 1), advantages_2bT.permute(1, 2, 0), out=row_products_B22[part])

    count = mask_BT.new_tensor(rows * (after - before), dtype=torch.float64)
    for margin in margins:
        count += torch.count_nonzero(mask_BT[:, margin])
    sums_2, products_22 = row_sums_2B.double().sum(dim=1), row_products_B22.double().sum(dim=0)
    sums_6 = torch.stack([count, *sums_2, products_22[0, 0], products_22[1, 1], products_22[0, 1]])
    return ShapedGae(*outputs_4BT.unbind(), sums_6)


def _mask(x_2bT: torch.Tensor, keep_bT: torch.Tensor, margins: list[slice]) -> None:
    """Zero, in place, where keep is 0; unchanged where it is -1.

    `keep & x` is one vector instruction and takes NaN away (torch.where takes ten times as long).
    """
    for margin in margins:
        x_2bT[:, :, margin].view(torch.int32).bitwise_and_(keep_bT[:, margin])


class _BlockScan:
    """x_t = c x_{t+1} - minus_t over the last dimension, by two small matrix products: within blocks, over blocks.

    All entries are powers of c with exponents >= 0, so that nothing overflows for c <= 1, whatever T.
    """

    def __init__(self, columns: int, c: float, device: torch.device):
        # Work per element: the block size plus (number of blocks) / (block size); smallest at (2 T)^(1/3).
        self.block = 1 << max(2, round(math.log2(2 * columns) / 3))
        self.blocks = -(-columns // self.block)
        self.padded = self.block * self.blocks
        self.within_KK = -self._powers(self.block, c, device)
        self.over_nn = self._powers(self.blocks, c**self.block, device)
        # What the block after adds to column i: c^(block - i) times its first x.
        self.carry_K = torch.pow(c, torch.arange(self.block, 0, -1, dtype=torch.float64, device=device)).float()

    @staticmethod
    def _powers(size: int, c: float, device: torch.device) -> torch.Tensor:
        """[size, size], c^(j - i) at row j, column i <= j."""
        powers = torch.pow(c, torch.arange(size, dtype=torch.float64, device=device)).float()
        # Window j of `unfold` runs from c^(j - size + 1) to c^j; zeros stand for the negative exponents.
        return torch.cat([powers.new_zeros(size - 1), powers]).unfold(0, size, 1).flip(1)

    def __call__(self, minus_2bT: torch.Tensor, out_2bT: torch.Tensor) -> torch.Tensor:
        """Fills and returns out; both arguments are [2, b, padded], contiguous in the last two dimensions."""
        rows = minus_2bT.size(1)
        torch.matmul(minus_2bT.view(2, -1, self.block), self.within_KK, out=out_2bT.view(2, -1, self.block))
        out_2bnK = out_2bT.view(2, rows, self.blocks, self.block)
        firsts_2bn = out_2bnK[..., 0] @ self.over_nn
        out_2bnK[:, :, :-1].addcmul_(firsts_2bn[:, :, 1:, None], self.carry_K)
        return out_2bT
