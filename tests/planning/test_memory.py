"""The formulas on paper: small cases by hand, and laws that hold whatever the sizes."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_safe.config import ModelConfig
from megatron_safe.kernels import linear_logprob
from megatron_safe.planning import memory
from megatron_safe.planning.layout import Layout, nearest, possible

MODEL = ModelConfig(num_layers=4, hidden_size=8, ffn_hidden_size=12, num_attention_heads=4, num_query_groups=2)
"""D = 2: q 8, k and v 4 each."""


def test_parameters_by_hand():
    # norms 2 * 8; qkv (8 + 4 + 4) * 8; proj 8 * 8; gate, up, down 3 * 12 * 8
    assert memory.layer_parameters(MODEL, 1) == 16 + 128 + 64 + 288
    assert memory.layer_parameters(MODEL, 2) == 16 + 64 + 32 + 144
    rich = dataclasses.replace(MODEL, qkv_bias=True, qk_norm=True)
    assert memory.layer_parameters(rich, 2) == memory.layer_parameters(MODEL, 2) + 8 + 4
    of = memory.stage_parameters
    assert of(MODEL, 32, "language", Layout(), 0) == 4 * 496 + 2 * 32 * 8 + 8
    tied = dataclasses.replace(MODEL, tie_embeddings=True)
    assert of(tied, 32, "language", Layout(), 0) == 4 * 496 + 32 * 8 + 8
    pipeline = Layout(pp=2)
    assert [of(tied, 32, "language", pipeline, i) for i in (0, 1)] == [2 * 496 + 256, 2 * 496 + 256 + 8]
    assert [of(MODEL, 32, "scalar", pipeline, i) for i in (0, 1)] == [2 * 496 + 256, 2 * 496 + 8 + 9]
    assert of(MODEL, 32, "scalar", pipeline, 1, outputs=2) == 2 * 496 + 8 + 18
    assert of(MODEL, 32, "language", Layout(tp=2), 0) == 4 * 256 + 2 * 16 * 8 + 8


def test_training_state_by_hand():
    assert memory.weight_bytes(100, "bf16") == 200
    assert memory.gradient_bytes(100) == 400
    assert memory.optimizer_bytes(100, "fp32", 1) == 800
    assert memory.optimizer_bytes(100, "bf16", 1) == 1200
    assert memory.optimizer_bytes(100, "bf16", 4) == 300


def test_activations_by_hand():
    def bytes_of(precision, layout, read=10, device="gpu"):
        return memory.layer_activation_bytes(MODEL, 10, read, precision, layout, device)

    # Of a token: norms 2 * (2 * 8 * 2 + 4); qkv 16 * 2; rotated q, k and output (8 + 4 + 8) * 2; 4 * 4; MLP 5 * 12 * 2.
    assert bytes_of("bf16", Layout()) == 10 * (72 + 32 + 40 + 16 + 120)
    assert bytes_of("bf16", Layout(), device="cpu") == 10 * (72 + 32 + 40 + 16 + 120 + 16)
    assert bytes_of("bf16", Layout(tp=2)) == 10 * (72 + 16 + 20 + 8 + 60)
    assert bytes_of("bf16", Layout(tp=2, sequence_parallel=True)) == 10 * (36 + 16 + 20 + 8 + 60)
    assert bytes_of("bf16", Layout(recompute="full")) == 10 * 16
    assert bytes_of("bf16", Layout(recompute="selective")) == 10 * (72 + 32 + 16 + 120)
    # 5 of 10 tokens on a rank, which gathers k and v of all.
    assert bytes_of("bf16", Layout(cp=2)) == 5 * (72 + 32 + 40 + 16 + 120) + 10 * 2 * 2 * 4
    # Last layer, 4 of 10 tokens read: one norm, the projection's input and the MLP for these.
    assert bytes_of("bf16", Layout(), read=4) == 14 * 36 + 10 * (32 + 40 + 16) + 4 * (16 + 120)


def test_cache_by_hand():
    # 2 (k, v) * 2 layers * 2 elements * 100 positions * 2 bytes
    assert memory.cache_bytes_per_slot(MODEL, 100, "bf16", Layout(tp=2, pp=2)) == 2 * 2 * 2 * 100 * 2


def test_packs_in_flight_by_hand():
    assert [Layout(pp=4).in_flight(stage, 8) for stage in range(4)] == [4, 3, 2, 1]
    assert Layout(pp=4).in_flight(0, 2) == 2
    # Megatron-Core's interleaved warm-up: (p - stage - 1) * 2 + (v - 1) * p chunks, and the one at work.
    assert [Layout(pp=2, virtual=2).in_flight(stage, 8) for stage in (0, 1)] == [5 / 2, 3 / 2]
    assert Layout(pp=2, virtual=2).in_flight(0, 1) == 1


def test_the_heads_chunk_is_the_kernels():
    assert memory.HEAD_CHUNK == {"cpu": linear_logprob._CPU_CHUNK, "gpu": linear_logprob._GPU_CHUNK}
    assert memory.HEAD_BLOCK == linear_logprob._BLOCK


MODELS = st.builds(
    lambda layers, heads, groups, size, ffn: ModelConfig(
        num_layers=4 * layers, hidden_size=4 * heads * size * 2, num_attention_heads=4 * heads,
        num_query_groups=4 * heads if groups else 4, head_dim=2 * size, ffn_hidden_size=4 * ffn,
    ),
    st.integers(1, 8), st.integers(1, 4), st.booleans(), st.integers(1, 64), st.integers(1, 200),
)  # fmt: skip
LAYOUTS = st.builds(
    Layout, st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 8]), st.just(1),
    st.just(1), st.booleans(), st.sampled_from(["none", "selective", "full"]),
)  # fmt: skip
PRECISIONS = st.sampled_from(["fp32", "bf16"])


@given(MODELS, LAYOUTS, st.sampled_from(["language", "scalar"]))
def test_stages_of_all_ranks_hold_the_whole_model(model, layout, head):
    """Matrices are nowhere twice; norms, and a scalar head, once for each TP rank."""
    whole = memory.stage_parameters(model, 128, head, Layout(), 0)
    ranks = layout.tp * sum(memory.stage_parameters(model, 128, head, layout, s) for s in range(layout.pp))
    copied = (2 * model.num_layers + 1) * model.hidden_size + (model.hidden_size + 1 if head == "scalar" else 0)
    assert ranks == whole + (layout.tp - 1) * copied


@given(MODELS, LAYOUTS, PRECISIONS, st.integers(1, 10**5), st.floats(0, 1), st.sampled_from(["cpu", "gpu"]))
def test_what_is_meant_to_save_activations_does(model, layout, precision, tokens, share, device):
    def kept(layout, tokens=tokens):
        return memory.stage_activation_bytes(
            model, tokens, share * tokens, precision, layout, layout.pp - 1, device
        )

    plain = dataclasses.replace(layout, recompute="none", sequence_parallel=False)
    selective, full = (dataclasses.replace(plain, recompute=what) for what in ("selective", "full"))
    assert kept(full) <= kept(selective) <= kept(plain) + 1e-6 * kept(plain)
    assert kept(layout, 2 * tokens) == pytest.approx(2 * kept(layout))
    wider = dataclasses.replace(plain, tp=2 * plain.tp)
    assert kept(wider) < kept(plain)
    whole_rows = memory.layer_activation_bytes(model, tokens, tokens, precision, plain, device)
    split = dataclasses.replace(plain, sequence_parallel=True)
    assert memory.layer_activation_bytes(model, tokens, tokens, precision, split, device) <= whole_rows


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 64))
def test_later_stages_hold_fewer_packs(pp, virtual, packs):
    layout = Layout(pp=pp, virtual=virtual)
    held = [layout.in_flight(stage, packs) for stage in range(pp)]
    assert held == sorted(held, reverse=True)
    assert 0 < held[-1] and held[0] <= packs


def test_the_nearest_layout_is_the_one_with_the_fewest_changes():
    models = [dataclasses.replace(MODEL, num_layers=8)]
    found = nearest(Layout(tp=1, pp=1, dp=8), models, 8, 4, lambda layout: layout.tp * layout.pp >= 2)
    assert (found.tp, found.pp, found.dp) in {(2, 1, 4), (1, 2, 4)}
    found = nearest(Layout(tp=2, pp=1, dp=4), models, 8, 4, lambda layout: layout.pp >= 4)
    assert (found.tp, found.pp, found.dp) == (2, 4, 1)
    # TP 4 does not divide the two key/value heads.
    assert nearest(Layout(dp=8), models, 8, 4, lambda layout: layout.tp == 4) is None
    assert not possible(models, Layout(dp=3), 8)
