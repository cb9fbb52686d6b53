"""Where every token of every row goes, and how full the packs are.

Legend: B rows of S columns, T tokens of a pack, N places that are read.
"""

import math

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st

from megatron_safe.models.packing import Sequences, pack


def make_sequences(lengths, read=lambda row, column: False) -> Sequences:
    """Every token, and what stands behind the rows, is a number of its own, from 1 on."""
    rows, columns = len(lengths), max(lengths) + 2
    inside = [[i < length and read(row, i) for i in range(columns)] for row, length in enumerate(lengths)]
    return Sequences(
        torch.arange(1, rows * columns + 1).view(rows, columns), torch.tensor(lengths), torch.tensor(inside)
    )


def rows_of(one) -> list[list[int]]:
    """The tokens of each of a pack's sequences."""
    return [tokens.tolist() for tokens in one.tokens_1T[0].split(one.lengths)]


@st.composite
def cases(draw):
    """Sequences, and the arguments of `pack`."""
    together = draw(st.integers(1, 3))
    units = st.lists(st.integers(1, 12), min_size=together, max_size=together)
    lengths = sum(draw(st.lists(units, min_size=1, max_size=10)), [])
    read = draw(st.randoms(use_true_random=False))
    share = draw(st.sampled_from([0.0, 0.4, 1.0]))
    sequences = make_sequences(lengths, lambda *_: read.random() < share)
    return sequences, dict(
        max_tokens=draw(st.integers(1, 60)), at_least=draw(st.integers(1, 5)), together=together,
        equal=draw(st.booleans()),
    )  # fmt: skip


@given(cases())
def test_every_token_of_every_row_is_in_one_pack_at_its_own_position(case):
    sequences, arguments = case
    lengths, tokens_BS = sequences.lengths_B.tolist(), sequences.tokens_BS.tolist()
    found = []
    for one in pack(sequences, **arguments):
        assert one.tokens_1T.shape == (1, sum(one.lengths))
        assert one.tokens_1T.dtype == one.positions_T.dtype == torch.int64
        assert [p for n in one.lengths for p in range(n)] == one.positions_T.tolist()
        assert one.offsets.dtype == torch.int32
        assert one.offsets.tolist() == [sum(one.lengths[:i]) for i in range(len(one.lengths) + 1)]
        sequences_found = rows_of(one)
        if arguments["equal"] and not any(sequences_found[-1]):
            sequences_found.pop()  # the pads
        found += sequences_found
    assert sorted(found) == [row[:length] for row, length in zip(tokens_BS, lengths, strict=True)]


@given(cases())
def test_places_are_counted_row_by_row(case):
    sequences, arguments = case
    wanted = [
        token
        for tokens, read in zip(sequences.tokens_BS.tolist(), sequences.read_BS.tolist(), strict=True)
        for token, is_read in zip(tokens, read, strict=True)
        if is_read
    ]
    event("nothing is read" if not wanted else "some is read")
    found = {}
    for one in pack(sequences, **arguments):
        assert one.read_N.dtype == one.places_N.dtype == torch.int64
        assert one.read_N.tolist() == sorted(set(one.read_N.tolist()))
        for row, place in zip(one.read_N.tolist(), one.places_N.tolist(), strict=True):
            assert place not in found
            found[place] = int(one.tokens_1T[0, row])
    assert [found[place] for place in range(len(wanted))] == wanted and len(found) == len(wanted)


@given(cases())
def test_how_many_packs_there_are_and_how_full(case):
    sequences, arguments = case
    together, max_tokens = arguments["together"], arguments["max_tokens"]
    lengths = sequences.lengths_B.tolist()
    units = [sum(lengths[i : i + together]) for i in range(0, len(lengths), together)]
    packs = pack(sequences, **arguments | {"equal": False})
    weights = [sum(one.lengths) for one in packs]
    for one, weight in zip(packs, weights, strict=True):
        assert weight <= max_tokens or len(one.lengths) == together
    assert max(weights) <= min(weights) + max(units)
    least = min(len(units), arguments["at_least"])
    assert len(packs) >= max(least, math.ceil(sum(units) / max(max_tokens, *units, 1)))
    # One pack fewer would have had to go beyond the budget, with a unit on top of others as long: more than half full.
    assert len(packs) <= max(least, math.ceil(2 * sum(min(unit, max_tokens) for unit in units) / max_tokens))


@given(cases())
def test_neighbours_stay_together_in_order(case):
    sequences, arguments = case
    together = arguments["together"]
    number = {int(tokens_S[0]): row for row, tokens_S in enumerate(sequences.tokens_BS)}
    for one in pack(sequences, **arguments):
        rows = [number[tokens[0]] for tokens in rows_of(one) if tokens[0]]
        for i in range(0, len(rows), together):
            assert rows[i] % together == 0 and rows[i : i + together] == list(range(rows[i], rows[i] + together))


@given(cases())
def test_equal_packs_differ_by_a_last_sequence_that_nobody_reads(case):
    sequences, arguments = case
    plain = pack(sequences, **arguments | {"equal": False})
    equal = pack(sequences, **arguments | {"equal": True})
    longest = max(sum(one.lengths) for one in plain)
    for one, other in zip(plain, equal, strict=True):
        missing = longest - sum(one.lengths)
        event(f"padded: {missing > 0}")
        assert other.lengths == one.lengths + (missing,) * (missing > 0)
        assert other.tokens_1T.tolist() == [one.tokens_1T[0].tolist() + [0] * missing]
        assert other.positions_T.tolist() == one.positions_T.tolist() + list(range(missing))
        assert torch.equal(other.read_N, one.read_N) and torch.equal(other.places_N, one.places_N)


@given(cases(), st.integers(2, 4))
def test_a_round_is_filled_with_packs_of_padding(case, round_of):
    sequences, arguments = case
    plain = pack(sequences, **arguments | {"equal": True})
    packs = pack(sequences, **arguments | {"equal": True}, round_of=round_of)
    assert len(packs) % round_of == 0 and len(packs) - len(plain) < round_of
    for one, other in zip(packs, plain, strict=False):
        assert torch.equal(one.tokens_1T, other.tokens_1T) and torch.equal(one.places_N, other.places_N)
    for one in packs[len(plain) :]:
        assert one.tokens_1T.shape == packs[0].tokens_1T.shape and not one.tokens_1T.any()
        assert len(one.read_N) == len(one.places_N) == 0 and len(one.lengths) == 1


@given(cases())
def test_runs_are_as_long_as_can_be(case):
    sequences, arguments = case
    for one in pack(sequences, **arguments):
        runs = list(one.runs())
        assert [length for count, length, _ in runs for _ in range(count)] == list(one.lengths)
        assert all(first[1] != second[1] for first, second in zip(runs, runs[1:], strict=False))
        if arguments["together"] == 1 and not arguments["equal"]:
            assert len(runs) == len(set(one.lengths))


def test_everything_goes_into_one_pack_where_the_budget_allows():
    (one,) = pack(make_sequences([3, 9, 1, 3]), 16)
    assert sorted(one.lengths) == [1, 3, 3, 9]
    assert len(pack(make_sequences([3, 9, 1, 3]), 15)) == 2
    assert len(pack(make_sequences([3, 9, 1, 3]), 16, at_least=3)) == 3
    assert len(pack(make_sequences([3, 9, 1, 3]), 16, at_least=7)) == 4


def test_a_row_above_the_budget_is_alone():
    packs = pack(make_sequences([3, 30, 2, 3, 2]), 10)
    assert sorted(sorted(one.lengths) for one in packs) == [[2, 2, 3, 3], [30]]


def test_a_long_row_is_no_excuse_for_the_others():
    """None of the rest may go beyond the budget because one row does anyway."""
    packs = pack(make_sequences([60, 30, 30, 30, 30]), 50)
    assert sorted(one.lengths for one in packs) == [(30,)] * 4 + [(60,)]


@pytest.mark.parametrize("lengths", [[1], [4], [3, 1, 5]])
def test_to_last_reads_the_last_token_of_each_row(lengths):
    plain = make_sequences(lengths)
    sequences = Sequences.to_last(plain.tokens_BS, plain.lengths_B)
    assert sequences.tokens_BS is plain.tokens_BS and sequences.lengths_B is plain.lengths_B
    read = sequences.read_BS.tolist()
    assert read == [[column == length - 1 for column in range(max(lengths) + 2)] for length in lengths]


def test_to_predict_leaves_out_the_last_token_of_each_row():
    plain = make_sequences([3, 6, 2])
    mask_BT = torch.zeros(3, 7, dtype=torch.bool)
    mask_BT[0, 1] = mask_BT[1, 2:5] = mask_BT[2, 0] = True  # the columns that predict answers of 1, 3 and 1 tokens
    sequences = Sequences.to_predict(plain.tokens_BS, plain.lengths_B, mask_BT)
    (one,) = pack(sequences, 100)
    found = dict(zip(one.places_N.tolist(), one.tokens_1T[0, one.read_N].tolist(), strict=True))
    assert found == {0: 2, 1: 11, 2: 12, 3: 13, 4: 17}  # 8 columns: row 1 begins with 9, row 2 with 17
    assert sorted(rows_of(one)) == [[1, 2], [9, 10, 11, 12, 13], [17]]
