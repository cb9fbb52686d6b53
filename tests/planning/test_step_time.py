"""Seconds on paper: small cases by hand, and laws that hold whatever the sizes."""

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_safe.config import ModelConfig
from megatron_safe.planning.layout import Layout
from megatron_safe.planning.rollout_time import Tick, answer_lengths, generate_seconds, stage_seconds, ticks
from megatron_safe.planning.step_time import (
    Pack,
    forward_seconds,
    optimizer_seconds,
    pipeline_seconds,
    update_seconds,
)
from megatron_safe.planning.workload import RoleShape

MODEL = ModelConfig(num_layers=2, hidden_size=8, ffn_hidden_size=12, num_attention_heads=4, num_query_groups=2)
ACTOR = RoleShape("actor", MODEL, "language", 32, trained=True)
CRITIC = RoleShape("reward_critic", MODEL, "scalar", 32, trained=True)


def test_operations_by_hand(machine):
    assert machine.rate(10, "fp32") == 1e9
    assert machine.rate(100, "fp32") == pytest.approx(2e9)  # half-way between the logarithms of 10 and 1000
    assert machine.rate(5, "fp32") == 0.5e9
    assert machine.rate(5000, "fp32") == 4e9
    assert machine.matmul(1000, 3, 7, "fp32", 4) == pytest.approx(2 * 1000 * 21 / 4e9)
    slow_memory = dataclasses.replace(machine, memory_bandwidth=1e6)
    assert slow_memory.matmul(10, 3, 7, "fp32", 4) == pytest.approx(4 * 21 / 1e6)
    # 4 ranks of one node; then 2 ranks of two nodes.
    assert machine.all_reduce(4e6, 4) == pytest.approx(2 * (1e-5 + 3e6 / 1e9))
    assert machine.all_gather(4e6, 2, 4) == pytest.approx(1e-4 + 2e6 / 1e8)
    assert machine.all_reduce(4e6, 1) == 0.0
    assert machine.send(1e6, 4) == pytest.approx(1e-4 + 1e-2)


def test_scoring_by_hand(machine):
    """1000 tokens in rows of 10, all read, scalar head, one rank."""
    weights = 16 * 8 + 8 * 8 + 24 * 8 + 12 * 8
    products = 2 * 1000 * weights / 4e9
    elementwise = 4 * 1000 * (8 * 8 + 7 * 12 + 8 * 8 + 7 * 12 + 2 * 8) / 2e9
    attention = 2 * 8 * 1000 * 10 / 1e9
    layer = products + elementwise + attention + 1e-5
    found = forward_seconds(CRITIC, Pack(1000, 1000, 10), 3, "fp32", Layout(), machine)
    assert found == pytest.approx(1e-3 + 3 * (2 * layer + 1e-4))
    many = forward_seconds(CRITIC, Pack(1000, 1000, 10, 5), 3, "fp32", Layout(), machine)
    assert many - found == pytest.approx(3 * 2 * 4 * 3e-5)


def test_training_by_hand(machine):
    weights = 16 * 8 + 8 * 8 + 24 * 8 + 12 * 8
    compute = 2 * 1000 * weights / 4e9 + 4 * 1000 * (8 * 8 + 7 * 12 + 8 * 8 + 7 * 12 + 2 * 8) / 2e9
    layer = 3 * compute + 3.5 * 2 * 8 * 1000 * 10 / 1e9 + 1e-5 + 2e-5
    parameters = 2 * (16 + weights) + 32 * 8 + 8 + 9
    found = update_seconds(CRITIC, Pack(1000, 1000, 10), 3, "fp32", Layout(), machine)
    assert found == pytest.approx(1e-3 + 3 * (2 * layer + 2e-4) + 1e-9 * parameters)
    # Four replicas in one node: an all-reduce of fp32 gradients; divided optimizers gather bf16 weights.
    reduction, _ = optimizer_seconds(CRITIC, "bf16", Layout(dp=4), machine)
    assert reduction == pytest.approx(2 * (1e-5 + 0.75 * 4 * parameters / 1e9))
    shared = dataclasses.replace(CRITIC, distributed=True)
    reduction, update = optimizer_seconds(shared, "bf16", Layout(dp=4), machine)
    assert reduction == pytest.approx(2e-5 + 0.75 * 6 * parameters / 1e9)
    assert update == pytest.approx(1e-9 * parameters / 4)


def test_the_pipeline_by_hand():
    assert pipeline_seconds([2.0], 5) == 10.0
    assert pipeline_seconds([2.0, 2.0, 2.0], 6) == 16.0  # (m + p - 1) t
    assert pipeline_seconds([2.0, 2.0, 2.0], 6, virtual=2) == 14.0
    assert pipeline_seconds([1.0, 3.0], 4) == 13.0


def test_ticks_by_hand():
    """Three answers of 2, 1 and 2 tokens in two slots, prompts of 5."""
    assert list(ticks([2, 1, 2], 2, 5.0)) == [
        Tick(2, 8.0, 10.0, 5.0),
        Tick(2, 4.0, 5 + 5 + 1, 6.0),
        Tick(1, 0.0, 6.0, 6.0),
    ]


def test_a_tick_by_hand(machine):
    tick, weights = Tick(10, 0.0, 700.0, 90.0), 16 * 8 + 8 * 8 + 24 * 8 + 12 * 8
    layer = 2 * 10 * weights / 5e8 + 4 * 10 * 312 / 2e9 + 1e-5 + 2 * 4 * 4 * 700 / 1e9
    head = 2 * 10 * 8 * 32 / 5e8 + 8 * 4 * 10 * 32 / 2e9
    found = stage_seconds(ACTOR, tick, 5.0, "fp32", Layout(), 0, machine)
    assert found == pytest.approx(2 * layer + 1e-4 + head)
    on_cpu = dataclasses.replace(machine, device="cpu")
    longer = stage_seconds(ACTOR, tick, 5.0, "fp32", Layout(), 0, on_cpu)
    assert longer - found == pytest.approx(2 * 2 * 4 * 4 * (10 * 96 - 700) / 1e9)


@given(st.integers(1, 300), st.integers(1, 64), st.integers(1, 64))
def test_the_generator_samples_every_token_once(samples, slots, most):
    lengths = answer_lengths(samples, 1 + 0.4 * (most - 1), most)
    assert len(lengths) == samples and 1 <= min(lengths) and max(lengths) <= most
    seen = list(ticks(lengths, slots, 9.0))
    assert sum(tick.samples for tick in seen) == sum(lengths)
    assert sum(tick.prompt_rows for tick in seen) == pytest.approx(8 * samples)
    assert max(tick.samples for tick in seen) <= slots
    assert len(seen) >= max(max(lengths), math.ceil(sum(lengths) / slots))


@given(st.floats(1.0, 60.0))
def test_lengths_have_the_mean_that_was_asked_for(mean):
    lengths = answer_lengths(4000, mean, 64)
    assert sum(lengths) / 4000 == pytest.approx(mean, rel=0.02)


LAYOUTS = st.builds(
    Layout, st.sampled_from([1, 2]), st.sampled_from([1, 2]), st.sampled_from([1, 2, 8]), st.just(1), st.just(1),
    st.booleans(), st.sampled_from(["none", "selective", "full"]),
)  # fmt: skip
PACKS = st.builds(Pack, st.floats(100, 1e5), st.floats(1, 100), st.floats(1, 1e3))


@settings(deadline=None)
@given(layout=LAYOUTS, pack=PACKS, packs=st.integers(1, 20), precision=st.sampled_from(["fp32", "bf16"]))
def test_more_work_takes_longer(machine, layout, pack, packs, precision):
    for role in (ACTOR, CRITIC):
        for seconds in (forward_seconds, update_seconds):
            found = seconds(role, pack, packs, precision, layout, machine)
            assert 0 < found < seconds(role, pack, packs + 1, precision, layout, machine)
            bigger = dataclasses.replace(pack, tokens=2 * pack.tokens)
            assert found < seconds(role, bigger, packs, precision, layout, machine)
            deeper = dataclasses.replace(role, model=dataclasses.replace(MODEL, num_layers=4))
            assert found < seconds(deeper, pack, packs, precision, layout, machine)
        assert forward_seconds(role, pack, packs, precision, layout, machine) < found


@settings(deadline=None)
@given(
    layout=LAYOUTS, pack=PACKS, factor=st.floats(1, 10),
    field=st.sampled_from([
        "memory_bandwidth", "elementwise_bandwidth", "optimizer", "inside", "between", "flops", "decode_flops",
    ]),
)  # fmt: skip
def test_a_better_machine_is_not_slower(machine, layout, pack, factor, field):
    value = getattr(machine, field)
    if field == "optimizer":
        better = value / factor
    elif field in ("flops", "decode_flops"):
        better = {name: [(rows, factor * rate) for rows, rate in known] for name, known in value.items()}
    elif field in ("inside", "between"):
        better = dataclasses.replace(value, latency=value.latency / factor, bandwidth=value.bandwidth * factor)
    else:
        better = value * factor
    faster, lengths = dataclasses.replace(machine, **{field: better}), answer_lengths(12, 5, 9)
    for seconds in (
        lambda m: update_seconds(ACTOR, pack, 4, "fp32", layout, m),
        lambda m: generate_seconds(ACTOR, lengths, 6, 7.0, "fp32", layout, m),
    ):
        assert seconds(faster) <= seconds(machine) * (1 + 1e-12)


@settings(deadline=None)
@given(layout=LAYOUTS, pack=PACKS)
def test_recomputing_costs_time(machine, layout, pack):
    none, selective, full = (
        update_seconds(ACTOR, pack, 4, "fp32", dataclasses.replace(layout, recompute=what), machine)
        for what in ("none", "selective", "full")
    )
    assert none < selective < full
