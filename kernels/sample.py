"""Sampling from vocabulary shards with counter-based randomness: the same draw in every layout.

Each sample draws one uniform from Philox4x32-10 keyed by (seed, sample, position) and inverts the CDF in global
vocabulary order, so the token does not depend on how the vocabulary, the batch or the layers are split.

Legend: B samples, V vocabulary, V/p of it on each of p tensor-parallel ranks (`logits_Bv`).
"""

import torch
import torch.distributed as dist

from .vocab_parallel_logprob import combine_shards, scaled_logits

_MASK = 0xFFFFFFFF


def _mul_hi_lo(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # 32 x 32 -> 64 bit in int64, which is signed: split b so that no partial product exceeds 2^48.
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    low_word = (low + ((high & 0xFFFF) << 16)) & _MASK
    high_word = ((low >> 16) + high) >> 16
    return high_word & _MASK, low_word


def philox_uniform(seed: int, sample: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Uniforms in (0, 1), fp32, one per (sample, position); broadcasting int64 inputs.

    Philox4x32-10 (Salmon et al., 2011) with the counter (position, sample low word, sample high word, 0) and the two
    words of `seed` as its key; the top 24 bits of the first output word, centred in their interval (the last of them
    rounds to 1 in fp32 and is held below it).
    """
    sample, position = torch.broadcast_tensors(sample, position)
    c0, c1, c2 = position & _MASK, sample & _MASK, (sample >> 32) & _MASK
    c3 = torch.zeros_like(c0)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        hi0, lo0 = _mul_hi_lo(0xD2511F53, c0)
        hi1, lo1 = _mul_hi_lo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return ((c0 >> 8).double() + 0.5).mul_(2.0**-24).float().clamp_(max=1 - 2.0**-24)


def _all_reduce(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    if group is not None and group.size() > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def _keep_top_k(z_Bv: torch.Tensor, k: int, group: dist.ProcessGroup | None) -> torch.Tensor:
    best_Bk = z_Bv.topk(min(k, z_Bv.size(1)), dim=1).values
    if group is not None and group.size() > 1:
        parts = [torch.empty_like(best_Bk) for _ in range(group.size())]
        dist.all_gather(parts, best_Bk.contiguous(), group=group)
        best_Bk = torch.cat(parts, dim=1)
        best_Bk = best_Bk.topk(min(k, best_Bk.size(1)), dim=1).values
    return z_Bv.masked_fill(z_Bv < best_Bk[:, -1:], float("-inf"))


def _keep_top_p(z_Bv: torch.Tensor, top_p: float, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The largest logit threshold whose tokens hold at least `top_p` of the mass, by bisection: sums over shards
    decide each step, so the vocabulary is neither sorted nor gathered."""
    stats_pB = combine_shards(_max_and_sum(z_Bv), group)
    top_B = stats_pB[..., 0].max(dim=0).values
    p_Bv = (z_Bv - top_B[:, None]).exp()
    wanted_B = top_p * _all_reduce(p_Bv.sum(dim=1), group)
    # Bisect over the bit patterns of p, which order like the floats because p >= 0: 31 halvings are exact.
    bits_Bv = p_Bv.view(torch.int32).long()
    low_B, high_B = torch.zeros_like(bits_Bv[:, 0]), torch.full_like(bits_Bv[:, 0], 0x3F800001)
    for _ in range(31):
        middle_B = (low_B + high_B) // 2
        mass_B = _all_reduce((p_Bv * (bits_Bv >= middle_B[:, None])).sum(dim=1), group)
        enough_B = mass_B >= wanted_B
        low_B = torch.where(enough_B, middle_B, low_B)
        high_B = torch.where(enough_B, high_B, middle_B)
    return z_Bv.masked_fill(bits_Bv < low_B[:, None], float("-inf"))


def _max_and_sum(z_Bv: torch.Tensor) -> torch.Tensor:
    max_B = z_Bv.max(dim=1).values
    safe_B = torch.where(max_B.isinf(), 0.0, max_B)  # a shard that top-k or top-p emptied
    return torch.stack([max_B, (z_Bv - safe_B[:, None]).exp_().sum(dim=1)], dim=1)


def sample(
    logits_Bv: torch.Tensor,
    uniform_B: torch.Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per sample and its log-probability.

    Args:
        logits_Bv: [B, V/p] floating; rank r holds columns r V/p to (r + 1) V/p.
        uniform_B: [B] fp32 in (0, 1), the same on every rank (`philox_uniform`).
        temperature: logits are divided by it; 0 takes the likeliest token (the first, on a tie).
        top_k: keep the k largest logits (0: all; logits equal to the k-th are kept too).
        top_p: keep the smallest set of largest logits with this much probability (1: all).
        group: tensor-parallel group (None: the whole vocabulary is here).

    Returns:
        tokens [B] int64 and log-probabilities [B] fp32, the same on every rank. The log-probability is that of
        softmax(logits / temperature) over the WHOLE vocabulary, what a training forward recomputes, also when top-k or
        top-p narrowed the draw; at temperature 0 it is that of softmax(logits).
    """
    rank = 0 if group is None else group.rank()
    size = 1 if group is None else group.size()
    shard = logits_Bv.size(1)
    z_Bv = scaled_logits(logits_Bv, temperature or 1.0)

    full_pB2 = combine_shards(_max_and_sum(z_Bv), group)
    max_B = full_pB2[..., 0].max(dim=0).values
    mass_pB = full_pB2[..., 1] * (full_pB2[..., 0] - max_B).exp()
    log_sum_B = mass_pB.sum(dim=0).log()

    if temperature == 0:
        owner_B = full_pB2[..., 0].argmax(dim=0)
        local_B = z_Bv.argmax(dim=1)
    else:
        kept_Bv = z_Bv
        if top_k > 0:
            kept_Bv = _keep_top_k(kept_Bv, top_k, group)
        if top_p < 1:
            kept_Bv = _keep_top_p(kept_Bv, top_p, group)
        if kept_Bv is not z_Bv:
            kept_pB2 = combine_shards(_max_and_sum(kept_Bv), group)
            mass_pB = kept_pB2[..., 1] * (kept_pB2[..., 0] - max_B).exp()
        ends_pB = mass_pB.cumsum(dim=0)
        draw_B = uniform_B * ends_pB[-1]
        owner_B = (draw_B >= ends_pB).sum(dim=0).clamp(max=size - 1)
        cdf_Bv = (kept_Bv - max_B[:, None]).exp_().cumsum(dim=1)
        here_B = (draw_B - (ends_pB[rank] - mass_pB[rank])).clamp(min=0)
        # Rounding may push the draw past the last token that has mass: stay on it.
        here_B = torch.minimum(here_B, torch.nextafter(cdf_Bv[:, -1], torch.zeros_like(here_B)))
        local_B = torch.searchsorted(cdf_Bv, here_B[:, None], right=True)[:, 0].clamp(max=shard - 1)

    mine_B = owner_B == rank
    logit_B = z_Bv.gather(1, local_B[:, None])[:, 0]
    # A token id is exact in fp64 and the pair travels in one collective.
    pair_2B = torch.stack([(local_B + rank * shard).double(), logit_B.double()]) * mine_B
    pair_2B = _all_reduce(pair_2B, group)
    return pair_2B[0].long(), (pair_2B[1] - max_B).float() - log_sum_B
