"""Pairs to label: which prompts are asked, and that what is held out shares no prompt with what is learnt from."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_safe.data.records import Prompt
from megatron_safe.evaluation.answers import Answer
from megatron_safe.rounds.pairs import as_answers, draw, pair_rows, read_json_lines, split

ROWS = st.lists(
    st.builds(
        lambda prompt, past, i: {"prompt": prompt, "history": past, "response_0": str(i)},
        st.sampled_from("abcdefgh"), st.sampled_from([[], [["u", "v"]]]), st.integers(0, 9),
    ),
    min_size=1, max_size=60,
)  # fmt: skip


def asked(row):
    return row["prompt"], str(row["history"])


@given(ROWS, st.floats(0.01, 0.9))
def test_held_out_rows_share_no_prompt_with_the_others(rows, share):
    learnt, held_out = split(rows, share)
    assert not {asked(row) for row in learnt} & {asked(row) for row in held_out}
    assert len(learnt) + len(held_out) == len(rows) and held_out
    for part in (learnt, held_out):  # in their order
        places = [next(i for i, row in enumerate(rows) if row is one) for one in part]
        assert places == sorted(places)


@given(ROWS, st.floats(0.01, 0.9))
def test_no_more_is_held_out_than_the_last_prompt_brings(rows, share):
    _, held_out = split(rows, share)
    assert len(held_out) >= share * len(rows)
    counts = Counter(map(asked, held_out))
    last = asked(max(held_out, key=lambda row: next(i for i, one in enumerate(rows) if asked(one) == asked(row))))
    assert len(held_out) - counts[last] < share * len(rows)


@pytest.mark.parametrize(("pairs", "most"), [(3, 1), (5, 1), (12, 3)])
def test_every_prompt_is_drawn_as_often_as_any_other_or_once_more(pairs, most):
    prompts = [Prompt(str(i)) for i in range(5)]
    drawn = Counter(prompt.prompt for prompt in draw(prompts, pairs, seed=3))
    assert sum(drawn.values()) == pairs
    assert max(drawn.values()) == most and max(drawn.values()) - min(drawn[str(i)] for i in range(5)) <= 1
    assert draw(prompts, pairs, 3) == draw(prompts, pairs, 3) != draw(prompts, pairs, 4)
    assert draw(prompts, 0, 3) == prompts


def test_rows_may_hold_any_character(tmp_path):
    rows = [{"prompt": "a\u2028b\u0085c\x1cd"}, {"prompt": "e"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    assert read_json_lines(tmp_path / "rows.jsonl") == rows


def test_answers_come_back_out_of_the_rows():
    first = [Answer("now", "yes", True, True, "heat", history=(("before", "done"),))]
    second = [Answer("now", "", False, True, "heat", history=(("before", "done"),))]
    rows = pair_rows(first, second)
    assert as_answers(rows, 0) == first and as_answers(rows, 1) == second
