"""Packs dealt over context-parallel ranks: who has which token, who sees which key, and that attention is what it was.

Legend: T tokens of a pack, t of them on each of c ranks, N places that are read.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_safe.models import attention
from megatron_safe.models.attention import packed_attention
from megatron_safe.models.packing import Sequences, pack


@st.composite
def cases(draw):
    """Sequences whose tokens are numbers of their own, from 1 on, and the arguments of `pack` but for the rank."""
    together = draw(st.integers(1, 2))
    units = st.lists(st.integers(1, 23), min_size=together, max_size=together)
    lengths = torch.tensor(sum(draw(st.lists(units, min_size=1, max_size=6)), []))
    tokens_BS = torch.arange(1, len(lengths) * 25 + 1).view(len(lengths), 25)
    inside_BS = torch.arange(25) < lengths[:, None]
    read_BS = inside_BS & (torch.rand(inside_BS.shape, generator=torch.Generator().manual_seed(len(lengths))) < 0.5)
    arguments = dict(
        max_tokens=draw(st.integers(1, 80)), together=together, equal=draw(st.booleans()),
        multiple=draw(st.integers(1, 3)),
    )  # fmt: skip
    return Sequences(tokens_BS, lengths, read_BS), arguments, draw(st.integers(2, 4))


def dealt(case):
    """Of each pack: the whole one, unpadded, and all ranks' parts of it."""
    sequences, arguments, ranks = case
    parts = [pack(sequences, **arguments, share=(rank, ranks)) for rank in range(ranks)]
    wholes = pack(sequences, arguments["max_tokens"], together=arguments["together"])
    return list(zip(wholes, zip(*parts, strict=True), strict=True))


@settings(deadline=None, max_examples=40)
@given(cases())
def test_ranks_share_tokens_and_places(case):
    sequences, arguments, _ = case
    widths = set()
    for whole, parts in dealt(case):
        assert len({part.tokens_1T.size(1) for part in parts}) == 1
        widths.add(parts[0].tokens_1T.size(1))
        found = {
            (token, position)
            for part in parts
            for token, position in zip(part.tokens_1T[0].tolist(), part.positions_T.tolist(), strict=True)
            if token
        }
        expected = zip(whole.tokens_1T[0].tolist(), whole.positions_T.tolist(), strict=True)
        assert found == set(expected) and len(found) == sum(whole.lengths)
        places = torch.cat([part.places_N for part in parts])
        assert sorted(places.tolist()) == sorted(whole.places_N.tolist())
        for part in parts:
            read = sequences.tokens_BS[sequences.read_BS][part.places_N]
            assert torch.equal(part.tokens_1T[0][part.read_N], read)
    assert all(width % arguments["multiple"] == 0 for width in widths)
    assert not arguments["equal"] or len(widths) == 1


@settings(deadline=None, max_examples=40)
@given(cases())
def test_a_piece_sees_its_sequence_up_to_its_own_last_token(case):
    for _, parts in dealt(case):
        all_tokens = torch.cat([part.tokens_1T[0] for part in parts])
        for part in parts:
            assert part.offsets.tolist() == [sum(part.lengths[:i]) for i in range(len(part.lengths) + 1)]
            assert part.keys.offsets.tolist() == [sum(part.keys.lengths[:i]) for i in range(len(part.lengths) + 1)]
            assert part.longest > int(part.positions_T.max())
            tokens, positions = part.tokens_1T[0].split(part.lengths), part.positions_T.split(part.lengths)
            keys = all_tokens[part.keys.rows_K].split(part.keys.lengths)
            for token_l, position_l, key_k in zip(tokens, positions, keys, strict=True):
                assert (position_l.diff() == 1).all() and len(key_k) == position_l[-1] + 1
                assert torch.equal(key_k[position_l], token_l)
                # Numbers of one row follow each other; a pad is 0 and sees pads.
                assert (key_k == 0).all() if token_l[0] == 0 else (key_k.diff() == 1).all()


@settings(deadline=None, max_examples=40)
@given(cases())
def test_the_last_tokens_of_a_unit_are_on_one_rank(case):
    sequences, arguments, _ = case
    last = sequences.tokens_BS.gather(1, sequences.lengths_B[:, None] - 1).view(-1, arguments["together"])
    for unit in last.tolist():
        holders = [
            [token in part.tokens_1T for token in unit] for _, parts in dealt(case) for part in parts
        ]
        assert sum(all(holds) for holds in holders) == 1 and sum(any(holds) for holds in holders) == 1


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_have_as_much_to_do(ranks):
    """Tokens, and pairs of query and key, of one long sequence: equal but for what does not divide."""
    length = 1001
    sequences = Sequences.to_last(torch.ones((1, length), dtype=torch.int64), torch.tensor([length]))
    parts = [pack(sequences, 2000, share=(rank, ranks))[0] for rank in range(ranks)]
    assert parts[0].tokens_1T.size(1) <= length / ranks + 2
    pairs = [int((part.positions_T + 1)[part.tokens_1T[0] > 0].sum()) for part in parts]
    assert max(pairs) < 1.02 * min(pairs)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("ranks", [2, 3])
def test_attention_and_its_gradients_are_those_of_whole_sequences(monkeypatch, ranks, window):
    """The gathering is played by one process that has all ranks' keys."""
    torch.manual_seed(0)
    lengths = torch.tensor([1, 9, 4, 16, 2])
    numbers = torch.arange(1, 5 * 16 + 1).view(5, 16)
    sequences = Sequences(numbers, lengths, torch.zeros((5, 16), dtype=torch.bool))
    (whole,) = pack(sequences, 100)
    parts = [pack(sequences, 100, share=(rank, ranks))[0] for rank in range(ranks)]
    query, key, value, slope = (torch.randn(81, heads, 8, dtype=torch.float64) for heads in (4, 2, 2, 4))
    leaves = [x.requires_grad_() for x in (query, key, value)]

    def of(one, x):
        return x[one.tokens_1T[0]]

    context = packed_attention(*(of(whole, x) for x in leaves), whole, window)
    expected = torch.zeros_like(query).index_put((whole.tokens_1T[0],), context)
    gradients = torch.autograd.grad((expected * slope).sum(), leaves)

    keys, values = (torch.cat([of(part, x) for part in parts]) for x in (key, value))
    monkeypatch.setattr(attention, "gather_keys", lambda k, v, wanted: (keys[wanted.rows_K], values[wanted.rows_K]))
    found = torch.zeros_like(query)
    for part in parts:
        real = part.positions_T[: -part.lengths[-1]] if part.tokens_1T[0, -1] == 0 else part.positions_T
        context = packed_attention(*(of(part, x) for x in leaves), part, window)[: len(real)]
        found = found.index_put((part.tokens_1T[0, : len(real)],), context)
    torch.testing.assert_close(found, expected)
    for one, other in zip(torch.autograd.grad((found * slope).sum(), leaves), gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_without_ranks_to_share_with_nothing_is_dealt():
    lengths = torch.tensor([5, 3])
    (one,) = pack(Sequences.to_last(torch.ones((2, 5), dtype=torch.int64), lengths), 100)
    assert one.keys is None and sorted(one.lengths) == [3, 5] and one.longest == 5
