"""Sampling from vocabulary shards with counter-based randomness: the same draw in every layout.

Two streams of randomness draw different tokens from the same distribution, and neither depends on how the vocabulary,
the batch or the layers are split:

- One uniform per sample, Philox4x32-10 keyed by (seed, sample, position), inverts the CDF in global vocabulary order:
  all draws of the PyTorch path, and with top-k or top-p those on a GPU.
- Gumbel-max: argmax over tokens of z + g with z = logits / temperature and g = -log(-log(1 - v)), the uniforms v from
  Philox4x32-7 (Salmon et al., 2011: the fewest rounds that pass BigCrush) keyed by (seed, sample, position, token): the
  plain draw of the Triton path, from one read of the logits.

Legend: B samples, V vocabulary, V/p of it on each of p tensor-parallel ranks (`logits_Bv`).
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist

from .backend import tl, triton, use_triton
from .vocab_parallel_logprob import combine_shards, first_column, scaled, scaled_logits, writable_rows


class NoiseKey(NamedTuple):
    """What the Triton path's noise is keyed by, beside the token."""

    seed: int
    sample_ids_B: torch.Tensor  # [B] int64, on the logits' device, as
    positions_B: torch.Tensor  # [B] int64: which draw of the sample this is; its low 32 bits count


# Triton. A tile is four neighbouring quarters of _QUARTER global token ids, whose noise is the four words of as many
# counters. Tiles begin at multiples of their size, whatever the shard.

_QUARTER = 1024


@triton.jit
def _philox_7(c0, c1, c2, c3, key0, key1):
    """Philox4x32, seven rounds, on uint32."""
    for _ in tl.static_range(7):
        first = c0.to(tl.uint64) * 0xD2511F53  # one wide multiplication gives both halves
        second = c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (second >> 32).to(tl.uint32) ^ c1 ^ key0, (first >> 32).to(tl.uint32) ^ c3 ^ key1
        c1, c3 = second.to(tl.uint32), first.to(tl.uint32)
        key0 = tl.add(key0, 0x9E3779B9, sanitize_overflow=False)
        key1 = tl.add(key1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _uniform(word):
    """v = (word + 1/2) / 2^32 in (0, 1). Near 0, where the winners come from, fp32 is finest."""
    v = (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    return tl.where(v > 0.9999999, 0.9999999, v)


@triton.jit
def _gumbel(word):
    """-log(-log(1 - v))."""
    v = _uniform(word)
    series = v * (1.0 + v * (0.5 + v * (0.33333333 + v * (0.25 + v * 0.2))))
    return -tl.log(tl.where(v < 0.0625, series, -tl.log(1.0 - v)))


@triton.jit
def _load_quarter(row_ptr, columns, shard, inverse_temperature):
    inside = (columns >= 0) & (columns < shard)
    z = scaled(tl.load(row_ptr + columns, mask=inside, other=0.0), inverse_temperature)
    return tl.where(inside, z, float("-inf"))


@triton.jit
def _first_largest(x0, x1, x2, x3, columns, QUARTER: tl.constexpr):
    """The largest of four quarters and the first column that holds it."""
    largest = tl.max(tl.maximum(tl.maximum(x0, x1), tl.maximum(x2, x3)), axis=0)
    never = 2147483647
    where = tl.where(x3 == largest, columns + 3 * QUARTER, never)
    where = tl.where(x2 == largest, columns + 2 * QUARTER, where)
    where = tl.where(x1 == largest, columns + QUARTER, where)
    where = tl.where(x0 == largest, columns, where)
    return largest, tl.min(where, axis=0)


@triton.jit
def _draw_kernel(
    logits_ptr, sample_ids_ptr, positions_ptr, parts_ptr, row_stride, shard, first, tiles, key0, key1,
    inverse_temperature, GREEDY: tl.constexpr, QUARTER: tl.constexpr,
):  # fmt: skip
    """One program per tile of a row: the largest key z + g, its token and z, max z, and Σ exp(z - max).

    Two logarithms per token would cost more than reading it. With e = exp(z - max), which the sum needs anyway, the
    largest key has the largest e / E, E = -log(1 - v), and as E > v, e / v bounds that from above. Mostly one token's
    bound beats everybody's, and only its key is computed; where another comes near, all keys are.
    """
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = first // (4 * QUARTER) + tl.program_id(0) % tiles
    row_ptr = logits_ptr + row * row_stride
    lanes = tl.arange(0, QUARTER)
    columns = tile * (4 * QUARTER) + lanes - first
    z0 = _load_quarter(row_ptr, columns, shard, inverse_temperature)
    z1 = _load_quarter(row_ptr, columns + QUARTER, shard, inverse_temperature)
    z2 = _load_quarter(row_ptr, columns + 2 * QUARTER, shard, inverse_temperature)
    z3 = _load_quarter(row_ptr, columns + 3 * QUARTER, shard, inverse_temperature)
    largest, winner = _first_largest(z0, z1, z2, z3, columns, QUARTER)
    e0 = tl.exp(z0 - largest)
    e1 = tl.exp(z1 - largest)
    e2 = tl.exp(z2 - largest)
    e3 = tl.exp(z3 - largest)
    total = tl.sum((e0 + e1) + (e2 + e3), axis=0)

    if GREEDY:
        winner = tl.minimum(winner, shard - 1)  # NaN logits have no winner: still a token
        winner_z = scaled(tl.load(row_ptr + winner), inverse_temperature)
        best = largest
    else:
        sample_id = tl.load(sample_ids_ptr + row)
        c0 = (tl.load(positions_ptr + row) & 0xFFFFFFFF).to(tl.uint32)
        c1 = (sample_id & 0xFFFFFFFF).to(tl.uint32)
        c2 = ((sample_id >> 32) & 0xFFFFFFFF).to(tl.uint32)
        k0 = tl.to_tensor(key0).to(tl.uint32)
        k1 = tl.to_tensor(key1).to(tl.uint32)
        # The last word of the counter starts at 1: at 0 is `philox_uniform`.
        counters = (tile * QUARTER + lanes + 1).to(tl.uint32)
        w0, w1, w2, w3 = _philox_7(c0, c1, c2, counters, k0, k1)
        u0 = e0 / _uniform(w0)
        u1 = e1 / _uniform(w1)
        u2 = e2 / _uniform(w2)
        u3 = e3 / _uniform(w3)
        bound, winner = _first_largest(u0, u1, u2, u3, columns, QUARTER)
        winner = tl.minimum(winner, shard - 1)
        winner_z = scaled(tl.load(row_ptr + winner), inverse_temperature)
        within = winner + first - tile * (4 * QUARTER)
        s0, s1, s2, s3 = _philox_7(c0, c1, c2, (tile * QUARTER + within % QUARTER + 1).to(tl.uint32), k0, k1)
        quarter = within // QUARTER
        word = tl.where(quarter == 0, s0, tl.where(quarter == 1, s1, tl.where(quarter == 2, s2, s3)))
        best = winner_z + _gumbel(word)
        # Near: closer than what rounding of e, v and the keys (which grows with |z|) could turn.
        near = tl.exp(best - largest) * (1.0 - (1e-4 + 1e-6 * tl.abs(largest)))
        rivals = tl.sum(
            ((u0 >= near).to(tl.int32) + (u1 >= near).to(tl.int32))
            + ((u2 >= near).to(tl.int32) + (u3 >= near).to(tl.int32)),
            axis=0,
        )
        if rivals > 1:
            best, winner = _first_largest(
                z0 + _gumbel(w0), z1 + _gumbel(w1), z2 + _gumbel(w2), z3 + _gumbel(w3), columns, QUARTER
            )
            winner = tl.minimum(winner, shard - 1)
            winner_z = scaled(tl.load(row_ptr + winner), inverse_temperature)
    parts_ptr += tl.program_id(0).to(tl.int64) * 5
    tl.store(parts_ptr, best)
    tl.store(parts_ptr + 1, (first + winner).to(tl.float32))  # exact below 2^24
    tl.store(parts_ptr + 2, winner_z)
    tl.store(parts_ptr + 3, largest)
    tl.store(parts_ptr + 4, total)


@triton.jit
def _merge_kernel(
    parts_ptr, merged_ptr, tokens_ptr, log_probs_ptr, rows, parts, row_stride, part_stride,
    LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK rows: the parts of each, in vocabulary order, become one; the LAST writes the answer."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < rows
    part_ptr = parts_ptr + n * row_stride
    best = tl.load(part_ptr, mask=inside, other=0.0)
    token = tl.load(part_ptr + 1, mask=inside, other=0.0)
    z = tl.load(part_ptr + 2, mask=inside, other=0.0)
    largest = tl.load(part_ptr + 3, mask=inside, other=0.0)
    total = tl.load(part_ptr + 4, mask=inside, other=1.0)
    for _ in range(1, parts):
        part_ptr += part_stride
        key = tl.load(part_ptr, mask=inside, other=0.0)
        better = key > best
        best = tl.where(better, key, best)
        token = tl.where(better, tl.load(part_ptr + 1, mask=inside, other=0.0), token)
        z = tl.where(better, tl.load(part_ptr + 2, mask=inside, other=0.0), z)
        part_largest = tl.load(part_ptr + 3, mask=inside, other=0.0)
        new_largest = tl.maximum(largest, part_largest)
        part_total = tl.load(part_ptr + 4, mask=inside, other=1.0)
        total = total * tl.exp(largest - new_largest) + part_total * tl.exp(part_largest - new_largest)
        largest = new_largest
    if LAST:
        tl.store(tokens_ptr + n, token.to(tl.int64), mask=inside)
        tl.store(log_probs_ptr + n, (z - largest) - tl.log(total), mask=inside)
    else:
        merged_ptr += n * 5
        tl.store(merged_ptr, best, mask=inside)
        tl.store(merged_ptr + 1, token, mask=inside)
        tl.store(merged_ptr + 2, z, mask=inside)
        tl.store(merged_ptr + 3, largest, mask=inside)
        tl.store(merged_ptr + 4, total, mask=inside)


def _signed(word: int) -> int:
    # Triton compiles a kernel anew for an argument that needs 64 bits.
    return word - (1 << 32) if word >= 1 << 31 else word


def _launch_sample(
    logits_Bv: torch.Tensor, key: NoiseKey | None, temperature: float, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain draw; without a key, the likeliest token."""
    rows, shard = logits_Bv.shape
    first, tile = first_column(logits_Bv, group), 4 * _QUARTER
    tiles = (first + shard - 1) // tile - first // tile + 1
    tokens_B = logits_Bv.new_empty(rows, dtype=torch.int64)
    log_probs_B = logits_Bv.new_empty(rows, dtype=torch.float32)
    parts_BK5 = logits_Bv.new_empty(rows, tiles, 5, dtype=torch.float32)
    merged_B5 = logits_Bv.new_empty(rows, 5, dtype=torch.float32)

    def merge(parts, count, row_stride, part_stride, last):
        _merge_kernel[(triton.cdiv(rows, 32),)](
            parts, merged_B5, tokens_B, log_probs_B, rows, count, row_stride, part_stride,
            LAST=last, BLOCK=32, num_warps=1,
        )  # fmt: skip

    seed, sample_ids_B, positions_B = key if key is not None else NoiseKey(0, tokens_B, tokens_B)
    if rows:
        _draw_kernel[(rows * tiles,)](
            logits_Bv, sample_ids_B.contiguous(), positions_B.contiguous(), parts_BK5, logits_Bv.stride(0), shard,
            first, tiles, _signed(seed & _MASK), _signed((seed >> 32) & _MASK),
            1.0 if key is None else 1.0 / temperature, GREEDY=key is None, QUARTER=_QUARTER, num_warps=4,
        )  # fmt: skip
        alone = group is None or group.size() == 1
        merge(parts_BK5, tiles, tiles * 5, 5, alone)
        if not alone:
            merged_pB5 = combine_shards(merged_B5, group)
            merge(merged_pB5, merged_pB5.size(0), 5, rows * 5, True)
    return tokens_B, log_probs_B


# PyTorch.

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


def _invert_cdf(p_Bv: torch.Tensor, draw_B: torch.Tensor) -> torch.Tensor:
    """The first column at which the running sum of p exceeds the draw: first its block, then within, because only the
    blocks' sums need a pass over all of p. A draw past the sum, by rounding, stays on the last column that has mass."""
    blocks_BnW = p_Bv.unflatten(1, (-1, math.gcd(p_Bv.size(1), _BLOCK)))
    block_B1, rest_B = _first_above(blocks_BnW.sum(dim=2), draw_B)
    block_BW = blocks_BnW.gather(1, block_B1[..., None].expand(-1, 1, blocks_BnW.size(2)))[:, 0]
    column_B1, _ = _first_above(block_BW, rest_B)
    return (block_B1 * blocks_BnW.size(2) + column_B1)[:, 0]


def _first_above(p_Bn: torch.Tensor, draw_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """([B, 1] where the running sum exceeds the draw, [B] what the draw is past the sum of those before)."""
    ends_Bn = p_Bn.cumsum(dim=1)
    last_B = ends_Bn[:, -1]
    draw_B = torch.minimum(draw_B.clamp(min=0), torch.nextafter(last_B, torch.zeros_like(last_B)))
    where_B1 = torch.searchsorted(ends_Bn, draw_B[:, None], right=True).clamp_(max=p_Bn.size(1) - 1)
    return where_B1, draw_B - (ends_Bn.gather(1, where_B1) - p_Bn.gather(1, where_B1))[:, 0]


_BLOCK = 64  # columns


def sample(
    logits_Bv: torch.Tensor,
    uniform_B: torch.Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    group: dist.ProcessGroup | None = None,
    noise_key: NoiseKey | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per sample and its log-probability.

    The Triton path takes the greedy draw and, with a `noise_key`, the plain one (neither top-k nor top-p): one read of
    the logits, one all-gather of five floats a sample and rank. All others are the PyTorch path's.

    Args:
        logits_Bv: [B, V/p] floating; rank r holds columns r V/p to (r + 1) V/p.
        uniform_B: [B] fp32 in (0, 1), the same on every rank (`philox_uniform`); what the PyTorch path draws with.
        temperature: logits are divided by it; 0 takes the likeliest token (the first, on a tie).
        top_k: keep the k largest logits (0: all; logits equal to the k-th are kept too).
        top_p: keep the smallest set of largest logits with this much probability (1: all).
        group: tensor-parallel group (None: the whole vocabulary is here).
        noise_key: what the Triton path draws with, the same on every rank.

    Returns:
        tokens [B] int64 and log-probabilities [B] fp32, the same on every rank. The log-probability is that of
        softmax(logits / temperature) over the WHOLE vocabulary, what a training forward recomputes, also when top-k or
        top-p narrowed the draw; at temperature 0 it is that of softmax(logits). Sums accumulate in fp32. The paths'
        log-probabilities differ by about 1e-7 max(1, |z - max z|).
    """
    plain = top_k == 0 and top_p >= 1 and noise_key is not None
    if (temperature == 0 or plain) and use_triton(logits_Bv):
        return _launch_sample(writable_rows(logits_Bv), noise_key if temperature else None, temperature, group)
    rank = 0 if group is None else group.rank()
    size = 1 if group is None else group.size()
    shard = logits_Bv.size(1)
    z_Bv = scaled_logits(logits_Bv, temperature or 1.0)

    p_Bv = torch.softmax(z_Bv, dim=1)  # within this shard
    stats_B2 = torch.stack([z_Bv.amax(dim=1), p_Bv.amax(dim=1).reciprocal()], dim=1)  # max z, Σ exp(z - max)
    full_pB2 = combine_shards(stats_B2, group)
    max_B = full_pB2[..., 0].amax(dim=0)
    mass_pB = full_pB2[..., 1] * (full_pB2[..., 0] - max_B).exp()
    log_sum_B = mass_pB.sum(dim=0).log()

    if temperature == 0:
        owner_B = full_pB2[..., 0].argmax(dim=0)
        local_B = z_Bv.argmax(dim=1)
    else:
        unit_B = mass_pB[rank]  # what this shard's p are shares of
        if top_k > 0 or top_p < 1:
            kept_Bv = _keep_top_k(z_Bv, top_k, group) if top_k > 0 else z_Bv
            kept_Bv = _keep_top_p(kept_Bv, top_p, group) if top_p < 1 else kept_Bv
            p_Bv.masked_fill_(kept_Bv.isinf(), 0.0)
            mass_pB = combine_shards(p_Bv.sum(dim=1) * unit_B, group)
        ends_pB = mass_pB.cumsum(dim=0)
        draw_B = uniform_B * ends_pB[-1]
        owner_B = (draw_B >= ends_pB).sum(dim=0).clamp(max=size - 1)
        local_B = _invert_cdf(p_Bv, (draw_B - (ends_pB[rank] - mass_pB[rank])) / unit_B)

    logit_B = z_Bv.gather(1, local_B[:, None])[:, 0]
    if size > 1:
        # A token id is exact in fp64 and the pair travels in one collective.
        pair_2B = torch.stack([(local_B + rank * shard).double(), logit_B.double()]) * (owner_B == rank)
        dist.all_reduce(pair_2B, group=group)
        local_B, logit_B = pair_2B[0].long(), pair_2B[1]
    return local_B, (logit_B - max_B).float() - log_sum_B
