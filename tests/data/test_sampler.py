"""The laws of the sampler: epochs are permutations, and a step's batch depends on nothing but seed and step."""

import collections

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_safe.data.sampler import ShuffledStream, shard
from megatron_safe.errors import UserError

SIZES = st.integers(1, 40)
BATCHES = st.integers(1, 12)
SEEDS = st.integers(0, 2**63)


def flat(stream, steps):
    return [index for step in range(steps) for index in stream.indices(step)]


@given(size=SIZES, batch_size=BATCHES, seed=SEEDS)
def test_each_epoch_is_a_permutation(size, batch_size, seed):
    drawn = flat(ShuffledStream(size, batch_size, seed), steps=-(-3 * size // batch_size))
    for epoch in range(3):
        assert sorted(drawn[epoch * size : (epoch + 1) * size]) == list(range(size))


@given(size=SIZES, batch_size=BATCHES, seed=SEEDS)
def test_every_batch_is_full(size, batch_size, seed):
    stream = ShuffledStream(size, batch_size, seed)
    assert all(len(stream.indices(step)) == batch_size for step in range(20))


@given(size=SIZES, batch_size=BATCHES, seed=SEEDS, steps=st.lists(st.integers(0, 30), max_size=8))
def test_a_step_is_the_same_whatever_was_asked_before(size, batch_size, seed, steps):
    used = ShuffledStream(size, batch_size, seed)
    for step in steps:
        assert used.indices(step) == ShuffledStream(size, batch_size, seed).indices(step)


@given(size=SIZES, one=BATCHES, other=BATCHES, seed=SEEDS)
def test_the_order_of_rows_does_not_depend_on_the_batch_size(size, one, other, seed):
    steps = 24
    long, short = sorted((flat(ShuffledStream(size, b, seed), steps) for b in (one, other)), key=len, reverse=True)
    assert long[: len(short)] == short


def test_epochs_and_seeds_differ():
    stream = ShuffledStream(50, 50, seed=3)
    orders = [tuple(stream.indices(step)) for step in range(4)]
    orders += [tuple(ShuffledStream(50, 50, seed).indices(0)) for seed in range(3)]
    orders.append(tuple(range(50)))
    assert len(set(orders)) == len(orders)


def test_known_order():
    # Written down once: a change here breaks the resuming of every older run.
    assert [ShuffledStream(8, 4, seed=1).indices(step) for step in range(3)] == [
        [3, 5, 2, 7],
        [0, 6, 1, 4],
        [0, 6, 5, 3],
    ]


def test_rows_are_not_tied_to_places():
    """Over 2,000 epochs each of 5 rows comes first about 400 times (standard deviation 18)."""
    counts = collections.Counter(ShuffledStream(5, 5, seed=9).indices(step)[0] for step in range(2000))
    assert all(320 < counts[row] < 480 for row in range(5)), counts


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 4, 0), "dataset size: expected 1 or more, found 0"),
        ((9, 0, 0), "batch size: expected 1 or more, found 0"),
        ((9, 4, -1), "seed: expected 0 or more, found -1"),
    ],
)
def test_impossible_streams_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        ShuffledStream(*arguments)


@given(world=st.integers(1, 6), each=st.integers(1, 5), start=st.integers(0, 99))
def test_shards_are_equal_and_make_up_the_batch(world, each, start):
    batch = list(range(start, start + world * each))
    shards = [shard(batch, rank, world) for rank in range(world)]
    assert {len(part) for part in shards} == {each}
    assert [index for group in zip(*shards, strict=True) for index in group] == batch


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match="^batch size: expected a multiple of the data-parallel size 4, found 6$"):
        shard(list(range(6)), 0, 4)
