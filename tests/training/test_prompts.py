"""Which prompts a rollout batch answers: shares, evenness, and that only seed and step decide."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_safe.data.mixture import read
from megatron_safe.data.records import Prompt
from megatron_safe.errors import UserError
from megatron_safe.training.prompts import PromptStream


class Prompts(list):
    """As much of a PromptDataset as the stream asks for."""

    def __init__(self, marks):
        super().__init__(marks)
        self.records = [Prompt("p", red_team=mark) for mark in marks]


MIXED = Prompts([i % 3 == 0 for i in range(20)])  # 7 red-team, 13 other

mixtures = st.lists(st.booleans(), min_size=2, max_size=30).filter(lambda marks: len(set(marks)) == 2).map(Prompts)


@settings(deadline=None)
@given(prompts=st.integers(1, 30), batch=st.integers(1, 12), seed=st.integers(0, 2**40), epochs=st.integers(1, 3))
def test_without_a_share_every_epoch_takes_every_prompt_once(prompts, batch, seed, epochs):
    stream = PromptStream(Prompts([False] * prompts), batch, None, seed)
    steps = -(-epochs * prompts // batch)
    drawn = [index for step in range(steps) for index in stream.indices(step)]
    assert len(drawn) == steps * batch
    assert Counter(drawn[: epochs * prompts]) == {index: epochs for index in range(prompts)}


@settings(deadline=None)
@given(prompts=mixtures, batch=st.integers(1, 24), share=st.floats(0, 1), seed=st.integers(0, 2**40))
def test_each_batch_holds_its_share_evenly_spread(prompts, batch, share, seed):
    stream = PromptStream(prompts, batch, share, seed)
    reds = round(share * batch)
    for step in range(3):
        marks = [prompts[index] for index in stream.indices(step)]
        assert len(marks) == batch and sum(marks) == reds
        # In the first n places about n / batch of either kind, so that every mini-batch and every rank has its part.
        for n in range(batch + 1):
            assert abs(sum(marks[:n]) - n * reds / batch) <= 1 + 1e-9


@settings(deadline=None)
@given(prompts=mixtures, batch=st.integers(2, 12), seed=st.integers(0, 2**40))
def test_within_a_kind_no_prompt_is_taken_twice_before_all_were_taken_once(prompts, batch, seed):
    stream = PromptStream(prompts, batch, 0.5, seed)
    taken = Counter(index for step in range(6) for index in stream.indices(step))
    for mark in (True, False):
        counts = [taken[index] for index in range(len(prompts)) if prompts[index] == mark]
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("share", [None, 0.4])
def test_a_batch_is_a_function_of_seed_and_step(share):
    forward = PromptStream(MIXED, 6, share, 5)
    batches = [forward.indices(step) for step in range(8)]
    backward = PromptStream(MIXED, 6, share, 5)
    assert [backward.indices(step) for step in reversed(range(8))] == batches[::-1]
    assert [PromptStream(MIXED, 6, share, 6).indices(step) for step in range(8)] != batches


def test_all_of_one_kind_needs_none_of_the_other():
    assert all(not MIXED[i] for i in PromptStream(MIXED, 8, 0.0, 0).indices(0))
    assert all(MIXED[i] for i in PromptStream(MIXED, 8, 1.0, 0).indices(0))
    assert PromptStream(Prompts([True] * 3), 4, 1.0, 0).indices(0)
    assert PromptStream(Prompts([False] * 3), 4, 0.0, 0).indices(0)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(UserError, match="ppo.red_team_share: expected a number from 0 to 1, found"):
        PromptStream(MIXED, 8, share, 0)


@pytest.mark.parametrize("marks, missing", [([True] * 4, "false"), ([False] * 4, "true")])
def test_a_kind_that_is_missing_is_named(marks, missing):
    message = f"data.prompts: expected some with red_team {missing} for ppo.red_team_share 0.5, found none"
    with pytest.raises(UserError, match=message):
        PromptStream(Prompts(marks), 8, 0.5, 0)


@pytest.mark.parametrize("share", [None, 0.5])
def test_entries_with_weights_have_their_parts_within_each_kind(share, tmp_path):
    """Two entries have red-team prompts, 1 to 3; two have others, 3 to 1."""
    values = []
    for name, red, weight in (("a", True, 1), ("b", True, 3), ("c", False, 3), ("d", False, 1)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"prompt": f"{name}{n}", "red_team": red}) + "\n" for n in range(5)))
        values.append({"path": str(file), "weight": weight})
    mixture = read("prompts", "data.prompts", values)
    prompts = Prompts([record.red_team for record in mixture.records])
    prompts.records = mixture.records
    stream = PromptStream(prompts, 16, share, 9, mixture)
    for step in range(4):
        names = Counter(mixture.records[index].prompt[0] for index in stream.indices(step))
        assert names == {"a": 2, "b": 6, "c": 6, "d": 2}
