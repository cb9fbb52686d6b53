"""Gumbel-max draws in Triton's interpreter, from one, two and four vocabulary shards.

Legend: B samples, V vocabulary, V/p of it on a shard (`logits_Bv`).
"""

import math

import pytest
import torch
from drawing import chi_square, draw, full_log_probs, philox4x32_10
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_safe.kernels import sample as module
from megatron_safe.kernels.sample import NoiseKey, sample

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
