"""Counter-based uniforms, and draws from one, two and four vocabulary shards.

Legend: B samples, V vocabulary, V/p of it on a shard (`logits_Bv`).
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_safe.kernels import sample as module
from megatron_safe.kernels.sample import NoiseKey, philox_uniform, sample

# Philox.


def philox4x32_10(counter, key, rounds=10):
    """Salmon et al. (2011), figure 2 and table 2, in Python's own integers."""
    c, k = list(counter), list(key)
    for _ in range(rounds):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            (second >> 32) ^ c[1] ^ k[0], second & 0xFFFFFFFF, (first >> 32) ^ c[3] ^ k[1], first & 0xFFFFFFFF,
        ]  # fmt: skip
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


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


def chi_square(cells, expected):
    counts = torch.bincount(cells, minlength=len(expected)).double()
    return float(((counts - expected) ** 2 / expected).sum())


# Sampling.


def draw(rows, vocabulary, scale=3.0, seed=1):
    generator = torch.Generator().manual_seed(seed)
    logits_BV = scale * torch.randn(rows, vocabulary, generator=generator)
    return logits_BV, philox_uniform(seed, torch.arange(rows), torch.tensor(0))


def sample_sharded(on_shards, shards, logits_BV, uniform_B, *settings):
    width = logits_BV.size(1) // shards

    def on_rank(rank, group):
        return sample(logits_BV[:, rank * width : (rank + 1) * width].clone(), uniform_B, *settings, group)

    results = on_shards(shards, on_rank)
    for tokens_B, log_probs_B in results[1:]:
        assert torch.equal(tokens_B, results[0][0]) and torch.equal(log_probs_B, results[0][1])
    return results[0]


def full_log_probs(logits_BV, tokens_B, temperature):
    """log softmax(logits / temperature) over the whole vocabulary in float64; at temperature 0, of the logits."""
    return torch.log_softmax(logits_BV.double() / (temperature or 1.0), dim=1).gather(1, tokens_B[:, None])[:, 0]


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


# Triton, in its interpreter: Gumbel-max.

# numpy, of finfo.min / temperature and of rows of NaN.
interpreter_warnings = pytest.mark.filterwarnings(
    "ignore:overflow encountered:RuntimeWarning", "ignore:All-NaN slice:RuntimeWarning"
)

SMALL = 16  # lanes of a quarter, so that a tile is 64 tokens
IDS = [0, 1, 2**32 - 1, 2**40 + 7, 2**62]
POSITIONS = [2**31 + 5, 0, 2**32 - 1, 1, 77]


@pytest.mark.parametrize(
    "counter, key, output",
    [
        ([0] * 4, [0] * 2, "5f6fb709 0d893f64 4f121f81 4f730a48"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "4dfccaba 190a87f0 c47362ba b6b5242a",
        ),
    ],
)
def test_the_reference_gives_the_known_answers_of_seven_rounds(counter, key, output):
    """The lines `philox4x32 7` of kat_vectors."""
    assert " ".join(f"{word:08x}" for word in philox4x32_10(counter, key, rounds=7)) == output


def noise(key, row, vocabulary, quarter):
    """The Gumbel noise of each token, float64: word (v / quarter) % 4 of the counter that its tile's lane has."""
    seed, sample_id, position = key.seed, int(key.sample_ids_B[row]), int(key.positions_B[row]) & 0xFFFFFFFF
    values = []
    for v in range(vocabulary):
        counter = v // (4 * quarter) * quarter + v % quarter + 1
        words = philox4x32_10(
            [position, sample_id & 0xFFFFFFFF, sample_id >> 32, counter], [seed & 0xFFFFFFFF, seed >> 32], rounds=7
        )
        values.append(-math.log(-math.log1p(-(words[v // quarter % 4] + 0.5) / 2**32)))
    return torch.tensor(values, dtype=torch.float64)


def gumbel_sharded(on_shards, shards, logits_BV, key, temperature=1.0):
    uniform_B = torch.full((len(logits_BV),), float("nan"))  # this path must not need it
    width = logits_BV.size(1) // max(1, shards)

    def on_rank(rank, group):
        shard_Bv = logits_BV[:, rank * width : (rank + 1) * width].clone()
        return sample(shard_Bv, uniform_B, temperature, group=group, noise_key=key)

    results = on_shards(shards, on_rank) if shards else [on_rank(0, None)]
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0]) and torch.equal(other[1], results[0][1])
    tokens_B, log_probs_B = results[0]
    assert tokens_B.dtype == torch.int64 and log_probs_B.dtype == torch.float32
    return tokens_B, log_probs_B


@pytest.fixture
def small_tiles(triton_backend, monkeypatch):
    monkeypatch.setattr(module, "_QUARTER", SMALL)


@pytest.mark.parametrize(
    "temperature, dtype", [(0.6, torch.float32), (1.0, torch.bfloat16), (1.7, torch.float16)]
)
def test_gumbel_draws_are_those_of_the_formula_in_every_layout(small_tiles, on_shards, temperature, dtype):
    """148 tokens: no shard but the first begins with a tile."""
    logits_BV = draw(len(IDS), 148, scale=1.0)[0].to(dtype)
    key = NoiseKey(2**63 + 12345, torch.tensor(IDS), torch.tensor(POSITIONS))
    z_BV = logits_BV.double() / temperature
    keys_BV = z_BV + torch.stack([noise(key, row, 148, SMALL) for row in range(len(IDS))])
    top_B2 = keys_BV.topk(2, dim=1)
    assert (top_B2.values[:, 0] - top_B2.values[:, 1]).min() > 1e-4  # fp32 cannot decide otherwise
    for shards in (0, 1, 2, 4):
        tokens_B, log_probs_B = gumbel_sharded(on_shards, shards, logits_BV, key, temperature)
        assert tokens_B.tolist() == top_B2.indices[:, 0].tolist()
        expected_B = full_log_probs(logits_BV, tokens_B, temperature)
        torch.testing.assert_close(log_probs_B.double(), expected_B, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(0, 2), width=st.integers(1, 70), shards=st.sampled_from([0, 1, 2, 4]),
    seed=st.integers(0, 2**64 - 1), position=st.integers(0, 2**32 - 1), scale=st.floats(0.0, 10.0),
)  # fmt: skip
def test_gumbel_any_shape(small_tiles, on_shards, rows, width, shards, seed, position, scale):
    vocabulary = width * max(1, shards)
    logits_BV, _ = draw(rows, vocabulary, scale=scale)
    key = NoiseKey(seed, torch.arange(rows) + seed // 4, position + torch.arange(rows))
    tokens_B, log_probs_B = gumbel_sharded(on_shards, shards, logits_BV, key)
    for row in range(rows):
        keys_V = logits_BV[row].double() + noise(key, row, vocabulary, SMALL)
        assert keys_V[tokens_B[row]] >= keys_V.max() - 1e-4
    expected_B = full_log_probs(logits_BV, tokens_B, 1.0)
    torch.testing.assert_close(log_probs_B.double(), expected_B, rtol=1e-5, atol=1e-5)


def test_gumbel_tiles_of_full_size(triton_backend, on_shards):
    """More tokens than a tile of the real size holds; and a noise that seed, sample and position all change."""
    logits_BV = draw(1, 4996, scale=0.5)[0].expand(4, -1)
    drawn = set()
    for seed, position in ((3, 0), (4, 0), (3, 1)):
        key = NoiseKey(seed, torch.tensor([0, 1, 2, 1]), torch.full((4,), position))
        whole = gumbel_sharded(on_shards, 0, logits_BV, key)
        halves = gumbel_sharded(on_shards, 2, logits_BV, key)
        assert torch.equal(whole[0], halves[0]) and whole[0][1] == whole[0][3]
        torch.testing.assert_close(whole[1], halves[1], rtol=1e-6, atol=1e-6)
        again = gumbel_sharded(on_shards, 2, logits_BV, key)
        assert torch.equal(again[0], halves[0]) and torch.equal(again[1], halves[1])
        drawn |= set(whole[0].tolist())
    assert len(drawn) == 9
    expected = logits_BV[0].double() + noise(key, 0, 4996, 1024)
    assert whole[0][0] == expected.argmax()


def test_gumbel_follows_the_distribution(small_tiles):
    """Chi-square; and row by row the formula's token, also where the kernel's bound e / v names another first."""
    n = 120
    logits_1V, _ = draw(1, 5, scale=2.0, seed=3)
    key = NoiseKey(11, torch.arange(n), torch.full((n,), 4))
    tokens_B, _ = sample(logits_1V.expand(n, -1), torch.zeros(n), 0.8, noise_key=key)
    z_V = logits_1V[0].double() / 0.8
    assert chi_square(tokens_B, n * torch.softmax(z_V, dim=0)) < 5 + 6 * math.sqrt(2 * 5)
    noise_BV = torch.stack([noise(key, row, 5, SMALL) for row in range(n)])
    assert torch.equal(tokens_B, (z_V + noise_BV).argmax(dim=1))
    v_BV = -torch.expm1(-torch.exp(-noise_BV))
    assert 3 < ((z_V.exp() / v_BV).argmax(dim=1) != tokens_B).sum() < n / 2


def test_the_noise_of_many_tokens_is_gumbels():
    """Kolmogorov-Smirnov of 4,096 tokens' noise against exp(-exp(-x))."""
    values = noise(NoiseKey(5, torch.tensor([9]), torch.tensor([2])), 0, 4096, 1024).sort().values
    cdf = torch.exp(-torch.exp(-values))
    assert (cdf - (torch.arange(4096) + 0.5) / 4096).abs().max() < 2 / math.sqrt(4096)


@interpreter_warnings
@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_triton_draws_no_padding_and_survives_extremes(small_tiles, on_shards, temperature):
    """Padding of some of a tile and whole shards; one token left, the last or the first; logits at ±1e4."""
    logits_BV, _ = draw(6, 136)
    lowest = torch.finfo(torch.float32).min
    logits_BV[0, 70:] = lowest
    logits_BV[1, 1:] = lowest
    logits_BV[2, :135] = -torch.inf
    logits_BV[3] += 1e4
    logits_BV[4] -= 1e4
    logits_BV[5] = torch.where(logits_BV[5] > 0, 1e4, -1e4)
    key = NoiseKey(1, torch.arange(6), torch.zeros(6, dtype=torch.int64))
    for shards in (0, 2, 4):
        tokens_B, log_probs_B = gumbel_sharded(on_shards, shards, logits_BV, key, temperature)
        assert tokens_B[0] < 70 and tokens_B[1] == 0 and tokens_B[2] == 135 and logits_BV[5, tokens_B[5]] == 1e4
        expected_B = full_log_probs(logits_BV, tokens_B, temperature)
        torch.testing.assert_close(log_probs_B.double(), expected_B, rtol=1e-5, atol=4e-3)  # fp32 near 1e4 / 0.5
        assert (log_probs_B[1:3] == 0).all()


def test_triton_greedy(small_tiles, on_shards):
    """The largest logit; the first of several, in one lane's quarters, in neighbouring tiles and in other shards."""
    logits_BV, uniform_B = draw(5, 152)
    logits_BV[1, [40, 24, 8]] = 99.0
    logits_BV[2, [150, 130, 70]] = 99.0
    logits_BV[3, [37, 38, 75, 76]] = 99.0
    logits_BV[4] = 0.0
    for shards in (0, 1, 2, 4):
        tokens_B, log_probs_B = gumbel_sharded(on_shards, shards, logits_BV, None, 0.0)
        assert tokens_B.tolist() == [int(logits_BV[0].argmax()), 8, 70, 37, 0]
        expected_B = full_log_probs(logits_BV, tokens_B, 0.0)
        torch.testing.assert_close(log_probs_B.double(), expected_B, rtol=1e-5, atol=1e-5)
    with_key = sample(logits_BV, uniform_B, 0.0, 3, 0.5, noise_key=NoiseKey(0, torch.arange(5), torch.arange(5)))
    assert torch.equal(with_key[0], tokens_B)


@interpreter_warnings
def test_triton_edges_of_the_input(small_tiles):
    """No rows; columns apart; NaN logits, which are somebody else's error, still give a token of the vocabulary."""
    logits_BV, uniform_B = draw(3, 20)
    key = NoiseKey(2, torch.arange(3), torch.arange(3))
    expected = sample(logits_BV, uniform_B, noise_key=key)
    for view in (logits_BV.t().contiguous().t(), torch.cat([logits_BV] * 2, dim=1)[:, 20:]):
        assert not view.is_contiguous()
        found = sample(view, uniform_B, noise_key=key)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    none = sample(logits_BV[:0], uniform_B[:0], noise_key=NoiseKey(2, torch.arange(0), torch.arange(0)))
    assert none[0].shape == none[1].shape == (0,)
    tokens_B, log_probs_B = sample(logits_BV * float("nan"), uniform_B, noise_key=key)
    assert ((tokens_B >= 0) & (tokens_B < 20)).all() and log_probs_B.isnan().all()


def test_narrowed_draws_are_the_torch_paths(small_tiles):
    logits_BV, uniform_B = draw(4, 20)
    key = NoiseKey(2, torch.arange(4), torch.arange(4))
    for narrowed in ((1.0, 5, 1.0), (1.0, 0, 0.7)):
        found, expected = (sample(logits_BV, uniform_B, *narrowed, noise_key=k) for k in (key, None))
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
