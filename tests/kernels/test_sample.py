"""Counter-based uniforms, and draws from one, two and four vocabulary shards.

Legend: B samples, V vocabulary, V/p of it on a shard (`logits_Bv`).
"""

import math

import pytest
import torch
from drawing import chi_square, draw, full_log_probs, philox4x32_10
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_safe.kernels.sample import philox_uniform, sample

# Philox.


@pytest.mark.parametrize(
    "counter, key, output",
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_the_reference_gives_random123s_known_answers(counter, key, output):
    """The lines `philox4x32 10` of kat_vectors, which Random123 publishes."""
    assert " ".join(f"{word:08x}" for word in philox4x32_10(counter, key)) == output


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    ids=st.lists(st.integers(0, 2**63 - 1), min_size=1),
    position=st.integers(0, 2**32 - 1),
)
def test_philox_uniform_is_the_first_output_word(seed, ids, position):
    found = philox_uniform(seed, torch.tensor(ids), torch.tensor(position))
    assert found.dtype == torch.float32 and found.shape == (len(ids),)
    for value, i in zip(found.tolist(), ids, strict=True):
        word = philox4x32_10([position, i & 0xFFFFFFFF, i >> 32, 0], [seed & 0xFFFFFFFF, seed >> 32])[0]
        assert value == pytest.approx(((word >> 8) + 0.5) / 2**24, abs=2.0**-24) and 0 < value < 1


def test_the_first_known_answer_reaches_the_uniform():
    zero = torch.zeros((), dtype=torch.int64)
    assert philox_uniform(0, zero, zero).item() == pytest.approx((0x6627E8 + 0.5) / 2**24, abs=1e-8)


def test_no_uniform_is_zero_or_one():
    """Of 2^24 - 1/2 fp32 would make 2^24, and of the uniform 1; both counters were found by search."""
    smallest, largest = 14_883_995, 38_471_471
    words = [philox4x32_10([position, 0, 0, 0], [0, 0])[0] >> 8 for position in (smallest, largest)]
    assert words == [0, 2**24 - 1]
    uniforms = philox_uniform(0, torch.zeros((), dtype=torch.int64), torch.tensor([smallest, largest]))
    assert uniforms.tolist() == [2.0**-25, 1 - 2.0**-24]


def test_uniformity():
    """Chi-square over 1,024 cells, and of pairs of neighbours (positions, samples, seeds) over 16 x 16 cells."""
    n = 1 << 18
    u = philox_uniform(7, torch.arange(512)[:, None], torch.arange(512)[None, :])
    assert chi_square((u.flatten() * 1024).long(), torch.full((1024,), n / 1024)) < 1024 + 6 * math.sqrt(2 * 1024)
    other_seed = philox_uniform(8, torch.arange(512)[:, None], torch.arange(512)[None, :])
    for first, second in ((u[:, :-1], u[:, 1:]), (u[:-1], u[1:]), (u, other_seed)):
        cells = (first.flatten() * 16).long() * 16 + (second.flatten() * 16).long()
        assert chi_square(cells, torch.full((256,), len(cells) / 256)) < 256 + 6 * math.sqrt(2 * 256)


# Sampling.


def sample_sharded(on_shards, shards, logits_BV, uniform_B, *settings):
    width = logits_BV.size(1) // shards

    def on_rank(rank, group):
        return sample(logits_BV[:, rank * width : (rank + 1) * width].clone(), uniform_B, *settings, group)

    results = on_shards(shards, on_rank)
    for tokens_B, log_probs_B in results[1:]:
        assert torch.equal(tokens_B, results[0][0]) and torch.equal(log_probs_B, results[0][1])
    return results[0]


def kept_sets(logits_V, top_k, top_p, temperature):
    """The tokens that may be drawn, from a sort in Python, and the margin by which top-p's last one is decided."""
    order = sorted(range(len(logits_V)), key=lambda v: -logits_V[v])
    order = order[:top_k] if top_k else order
    weights = [math.exp((logits_V[v] - logits_V[order[0]]) / temperature) for v in order]
    total, mass, kept, margin = math.fsum(weights), 0.0, [], 1.0
    for v, weight in zip(order, weights, strict=True):
        margin = min(margin, abs(mass - top_p))
        if mass >= top_p:
            break
        kept.append(v)
        mass += weight / total
    return set(kept), margin


SETTINGS = {
    "greedy": (0.0, 0, 1.0),
    "plain": (1.0, 0, 1.0),
    "cold": (0.5, 0, 1.0),
    "hot": (2.0, 0, 1.0),
    "top-k": (1.0, 7, 1.0),
    "top-1": (1.0, 1, 1.0),
    "top-k beyond a shard": (1.0, 50, 1.0),
    "top-p": (1.0, 0, 0.8),
    "tiny top-p": (1.0, 0, 1e-6),
    "both": (1.3, 12, 0.7),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_shards_draw_as_the_whole_does(on_shards, shards, name):
    logits_BV, uniform_B = draw(400, 64)
    tokens_B, log_probs_B = sample(logits_BV, uniform_B, *SETTINGS[name])
    assert tokens_B.dtype == torch.int64 and log_probs_B.dtype == torch.float32
    sharded_tokens_B, sharded_log_probs_B = sample_sharded(on_shards, shards, logits_BV, uniform_B, *SETTINGS[name])
    assert torch.equal(sharded_tokens_B, tokens_B)
    torch.testing.assert_close(sharded_log_probs_B, log_probs_B, rtol=1e-5, atol=1e-5)
    # Whatever narrowed the draw, the log-probability is the whole softmax's.
    expected_B = full_log_probs(logits_BV, tokens_B, SETTINGS[name][0])
    torch.testing.assert_close(log_probs_B.double(), expected_B, rtol=1e-5, atol=1e-5)


def test_each_sample_is_drawn_by_itself():
    logits_BV, uniform_B = draw(50, 32)
    tokens_B, log_probs_B = sample(logits_BV, uniform_B, 1.0, 0, 0.9)
    for row in range(50):
        alone = sample(logits_BV[row : row + 1], uniform_B[row : row + 1], 1.0, 0, 0.9)
        assert alone[0].item() == tokens_B[row] and alone[1].item() == pytest.approx(float(log_probs_B[row]), abs=1e-6)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.8])
@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (5, 1.0), (0, 0.8)])
def test_draws_follow_the_distribution(temperature, top_k, top_p):
    n, vocabulary = 40_000, 12
    logits_1V, _ = draw(1, vocabulary, scale=1.0, seed=3)
    kept, _ = kept_sets(logits_1V[0].tolist(), top_k, top_p, temperature)
    assert (len(kept) == vocabulary) == (top_k == 0 and top_p == 1)
    uniform_B = philox_uniform(11, torch.arange(n), torch.tensor(4))
    tokens_B, _ = sample(logits_1V.expand(n, -1), uniform_B, temperature, top_k, top_p)
    p_V = torch.softmax(logits_1V[0].double() / temperature, dim=0)
    chosen = sorted(kept)
    p_V = p_V[chosen] / p_V[chosen].sum()
    assert set(tokens_B.unique().tolist()) == kept
    cells = torch.bucketize(tokens_B, torch.tensor(chosen))
    assert chi_square(cells, n * p_V) < len(chosen) + 6 * math.sqrt(2 * len(chosen))


def every_token_drawn(logits_V, settings, shards, on_shards):
    """The set of tokens drawn over a fine and even grid of uniforms."""
    grid = (torch.arange(2000) + 0.5) / 2000
    logits_BV = logits_V.expand(len(grid), -1)
    tokens_B, _ = sample_sharded(on_shards, shards, logits_BV, grid, *settings)
    return set(tokens_B.tolist())


@settings(deadline=None, max_examples=40)
@given(
    width=st.integers(1, 8),
    shards=st.sampled_from([1, 2, 4]),
    top_k=st.integers(0, 20),
    top_p=st.one_of(st.just(1.0), st.floats(0.05, 0.95)),
    temperature=st.floats(0.5, 2.0),
    seed=st.integers(0, 2**20),
)
def test_what_may_be_drawn_is_the_smallest_set(on_shards, width, shards, top_k, top_p, temperature, seed):
    logits_BV, _ = draw(1, width * shards, scale=1.0, seed=seed)
    kept, margin = kept_sets(logits_BV[0].tolist(), top_k, top_p, temperature)
    drawn = every_token_drawn(logits_BV[0], (temperature, top_k, top_p), shards, on_shards)
    assert drawn <= kept or margin < 1e-5
    # A grid of 2,000 sees every token with at least 1/1,000 of what is kept.
    p_V = torch.softmax(logits_BV[0].double() / temperature, dim=0)
    likely = {v for v in kept if p_V[v] / p_V[sorted(kept)].sum() > 1e-3}
    assert likely <= drawn or margin < 1e-5


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_top_k_keeps_exactly_the_k_largest(on_shards, shards):
    logits_V = torch.linspace(-0.5, 0.5, 16)[torch.randperm(16, generator=torch.Generator().manual_seed(2))]
    for k in range(1, 17):
        drawn = every_token_drawn(logits_V, (1.0, k, 1.0), shards, on_shards)
        assert drawn == set(logits_V.topk(k).indices.tolist())


def test_ties_with_the_kth_are_kept_and_the_first_likeliest_is_greedy(on_shards):
    logits_V = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    assert every_token_drawn(logits_V, (1.0, 2, 1.0), 2, on_shards) == {1, 2, 4}
    for shards in (1, 2, 4):
        assert every_token_drawn(logits_V, (0.0, 0, 1.0), shards, on_shards) == {1}
        assert every_token_drawn(logits_V.flip(0), (0.0, 0, 1.0), shards, on_shards) == {3}


EDGES = torch.tensor([2.0**-25, 2.0**-24, 1e-6, 0.5, 1 - 2.0**-20, 1 - 2.0**-24])


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("real", [1, 3, 8, 9, 13, 16])
def test_padding_is_never_drawn(on_shards, shards, name, real):
    """Columns of finfo.min up to whole shards of them, also at the ends of the unit interval."""
    logits_BV, uniform_B = draw(300, 16)
    uniform_B[: len(EDGES)] = EDGES
    logits_BV[:, real:] = torch.finfo(torch.float32).min
    tokens_B, log_probs_B = sample_sharded(on_shards, shards, logits_BV, uniform_B, *SETTINGS[name])
    assert int(tokens_B.max()) < real
    expected_B = full_log_probs(logits_BV[:, :real], tokens_B, SETTINGS[name][0])
    torch.testing.assert_close(log_probs_B.double(), expected_B, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_padding_before_the_real_tokens_is_never_drawn(on_shards, shards):
    logits_BV, _ = draw(len(EDGES), 16)
    logits_BV[:, :9] = torch.finfo(torch.float32).min
    tokens_B, _ = sample_sharded(on_shards, shards, logits_BV, EDGES, 0.8, 0, 1.0)
    assert int(tokens_B.min()) >= 9


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_the_ends_of_the_unit_interval(on_shards, shards):
    """Inverse CDF in vocabulary order: the first token near 0, the last near 1, in every layout."""
    logits_BV = torch.zeros(len(EDGES), 8)
    tokens_B, _ = sample_sharded(on_shards, shards, logits_BV, EDGES, 1.0, 0, 1.0)
    assert tokens_B.tolist() == [0, 0, 0, 4, 7, 7]
    _, uniform_B = draw(1000, 8)
    tokens_B, _ = sample_sharded(on_shards, shards, torch.zeros(1000, 8), uniform_B, 1.0, 0, 1.0)
    assert torch.equal(tokens_B, (uniform_B * 8).long())


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_extreme_logits(on_shards, shards, name):
    logits_BV, uniform_B = draw(40, 16)
    logits_BV[:10] += 1e4
    logits_BV[10:20] -= 1e4
    logits_BV[20:30] = torch.where(logits_BV[20:30] > 0, 1e4, -1e4)
    tokens_B, log_probs_B = sample_sharded(on_shards, shards, logits_BV, uniform_B, *SETTINGS[name])
    assert torch.equal(sample(logits_BV, uniform_B, *SETTINGS[name])[0], tokens_B)
    drawn_B = logits_BV.gather(1, tokens_B[:, None])[:, 0]
    assert (drawn_B[20:30] == 1e4).all()
    expected_B = full_log_probs(logits_BV, tokens_B, SETTINGS[name][0])
    # fp32 holds log Z of logits near 1e4 / 0.5 no finer than 2^-9.
    torch.testing.assert_close(log_probs_B.double(), expected_B, rtol=1e-5, atol=4e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits(dtype):
    logits_BV, uniform_B = draw(200, 32)
    logits_BV = logits_BV.to(dtype)
    tokens_B, log_probs_B = sample(logits_BV, uniform_B)
    assert torch.equal(tokens_B, sample(logits_BV.float(), uniform_B)[0])
    torch.testing.assert_close(log_probs_B.double(), full_log_probs(logits_BV, tokens_B, 1.0), rtol=1e-5, atol=1e-5)
