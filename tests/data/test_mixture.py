"""Entries of a config as records, and their proportions: what is refused, and the laws of the stream."""

import json
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_safe.cli import parse
from megatron_safe.data.mixture import MixtureStream, check_entries, parse_entries, read, schedule
from megatron_safe.data.sampler import ShuffledStream, shard
from megatron_safe.errors import UserError

WEIGHTS = st.lists(st.integers(1, 50), min_size=1, max_size=6)
GROUPS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 20)), min_size=1, max_size=4)  # (rows, weight)
SEEDS = st.integers(0, 2**63)


def make_stream(groups, batch_size, seed):
    """A stream whose rows are (group, row) by number, and those rows."""
    rows = [(group, row) for group, (size, _) in enumerate(groups) for row in range(size)]
    places = [[i for i, (of, _) in enumerate(rows) if of == group] for group in range(len(groups))]
    return MixtureStream(places, [weight for _, weight in groups], batch_size, seed), rows


# The schedule.


@given(weights=WEIGHTS)
def test_after_any_number_of_positions_each_part_is_within_a_row_of_its_share(weights):
    turns = schedule(weights)
    counts, total = Counter(), sum(weights)
    bound = 1 - Fraction(1, 2 * len(weights) - 2) if len(weights) > 1 else 0
    for t, turn in enumerate(turns, start=1):
        counts[turn] += 1
        for i, weight in enumerate(weights):
            assert abs(counts[i] - Fraction(t * weight, total)) <= bound
    # So it comes out even at the end, and may repeat.
    assert all(counts[i] * total == weight * len(turns) for i, weight in enumerate(weights))


def test_equal_weights_take_turns():
    assert sorted(schedule([5, 5, 5])) == [0, 1, 2]
    assert schedule([7]) == [0]


# The stream.


@given(groups=GROUPS, batch_size=st.integers(1, 12), seed=SEEDS)
def test_every_prefix_of_the_batches_has_its_proportions(groups, batch_size, seed):
    stream, rows = make_stream(groups, batch_size, seed)
    total = sum(weight for _, weight in groups)
    counts = Counter()
    for step in range(12):
        batch = stream.indices(step)
        assert len(batch) == batch_size
        counts.update(rows[i][0] for i in batch)
        for group, (_, weight) in enumerate(groups):
            assert abs(counts[group] - Fraction((step + 1) * batch_size * weight, total)) < 1


@given(groups=GROUPS, seed=SEEDS)
def test_within_a_group_each_epoch_takes_every_row_once(groups, seed):
    stream, rows = make_stream(groups, 7, seed)
    taken = [rows[i] for step in range(40) for i in stream.indices(step)]
    for group, (size, _) in enumerate(groups):
        of_group = [row for of, row in taken if of == group]
        for start in range(0, len(of_group) - size + 1, size):
            assert sorted(of_group[start : start + size]) == list(range(size))


@given(groups=GROUPS, batch_size=st.integers(1, 9), seed=SEEDS, steps=st.lists(st.integers(0, 99), max_size=6))
def test_a_batch_is_a_function_of_seed_and_step(groups, batch_size, seed, steps):
    used, _ = make_stream(groups, batch_size, seed)
    for step in steps:
        assert used.indices(step) == make_stream(groups, batch_size, seed)[0].indices(step)


@given(groups=GROUPS, seed=SEEDS)
def test_the_order_does_not_depend_on_the_batch_size(groups, seed):
    small, large = make_stream(groups, 3, seed)[0], make_stream(groups, 12, seed)[0]
    assert [i for step in range(12) for i in small.indices(step)] == [i for s in range(3) for i in large.indices(s)]


@given(sizes=st.lists(st.integers(20, 40), min_size=1, max_size=3), world=st.sampled_from([1, 2, 4]), seed=SEEDS)
def test_ranks_share_a_batch_without_duplicates(sizes, world, seed):
    """Within an epoch no row is on two ranks, nor twice on one."""
    stream, _ = make_stream([(size, 1) for size in sizes], 4, seed)
    for steps in (range(0, 5), range(2, 4)):
        dealt = [i for step in steps for rank in range(world) for i in shard(stream.indices(step), rank, world)]
        assert len(set(dealt)) == len(dealt)


def test_groups_of_one_size_are_shuffled_differently():
    stream, rows = make_stream([(30, 1), (30, 1)], 60, 3)
    order = [[row for of, row in (rows[i] for i in stream.indices(0)) if of == group] for group in (0, 1)]
    assert order[0] != order[1] and sorted(order[0]) == sorted(order[1])


# Entries.


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path):
    """Demonstrations a0..a5 and b0..b2."""
    return [
        write(tmp_path / f"{name}.jsonl", [{"prompt": f"{name}{n}", "response": "r"} for n in range(count)])
        for name, count in (("a", 6), ("b", 3))
    ]


def prompts(records):
    return [record.prompt for record in records]


def test_without_weights_all_rows_are_shuffled_together_as_ever(files):
    mixture = read("demonstrations", "data.train", [files[0], {"path": files[1]}])
    assert prompts(mixture.records) == [f"a{n}" for n in range(6)] + [f"b{n}" for n in range(3)]
    stream, before = mixture.stream(mixture.records, 4, 11), ShuffledStream(9, 4, 11)
    assert [stream.indices(step) for step in range(9)] == [before.indices(step) for step in range(9)]
    # Pinned: a run that was begun with these rows goes on with these batches.
    assert [stream.indices(step) for step in range(3)] == [[8, 5, 0, 7], [4, 3, 2, 6], [1, 3, 5, 1]]


def test_with_weights_each_entry_has_its_part_of_what_is_kept(files):
    values = [{"path": files[0], "weight": 0.25}, {"path": files[1], "weight": 0.75}]
    mixture = read("demonstrations", "data.train", values)
    kept = [record for record in mixture.records if record.prompt not in ("a0", "b1")]
    stream = mixture.stream(kept, 8, 0)
    for step in range(5):
        assert Counter(kept[i].prompt[0] for i in stream.indices(step)) == {"a": 2, "b": 6}
    with pytest.raises(UserError, match=r"data.train\[1\] .*b.jsonl: expected a row that is short enough"):
        mixture.stream(kept[:3], 8, 0)
    assert set(mixture.stream(kept[:3], 8, 0, may_lack=True).indices(0)) == {0, 1, 2}


BAD = {
    "empty": ([], "data.train: expected at least one path or {source, path, ...}, found an empty list"),
    "unknown source": (
        [{"path": "a", "source": "alpca"}],
        "data.train[0].source: expected one of plain, pku-saferlhf, beavertails, hh-rlhf, hh-red-team, alpaca, "
        "safe-unsafe-pairs, found 'alpca'",
    ),
    "another kind": (
        ["a", {"path": "a", "source": "beavertails"}],
        "data.train[1].source: expected one that gives demonstrations (plain, hh-rlhf, alpaca), found beavertails",
    ),
    "unknown key": ([{"file": "a"}], "data.train[0]: expected path, source, split, weight, question, found 'file'"),
    "no path": ([{"source": "plain"}], "data.train[0].path: expected a file, a folder or a hub name, found none"),
    "a number": ([{"path": 3}], "data.train[0].path: expected a string, found the number 3"),
    "no split": ([{"path": "a", "split": [1]}], "data.train[0].split: expected a string, found a list of 1 entries"),
    "zero weight": ([{"path": "a", "weight": 0}], "data.train[0].weight: expected a number above 0, found the "),
    "a word for a weight": ([{"path": "a", "weight": "x"}], "data.train[0].weight: expected a number above 0, found a"),
    "no number": ([{"path": "a", "weight": float("nan")}], "data.train[0].weight: expected a number above 0, found "),
    "some weights": ([{"path": "a", "weight": 1}, "b"], "data.train[1].weight: expected a weight, because other"),
    "odd weights": (
        [{"path": "a", "weight": 0.123456789}, {"path": "b", "weight": 1}],
        "data.train: expected weights in proportions that come out even within 100000 rows",
    ),
    "a needless question": (
        [{"path": "a", "question": "helpfulness"}], "data.train[0].question: expected none for source plain, found ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("values, message", BAD.values(), ids=BAD.keys())
def test_bad_entries_are_refused(values, message):
    with pytest.raises(UserError) as caught:
        parse_entries("data.train", values, "demonstrations", weighted=True)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_hh_rlhf_needs_a_question_that_its_labels_answer():
    def questions(path, kind="comparisons", **more):
        (entry,) = parse_entries("data.train", [{"path": path, "source": "hh-rlhf", **more}], kind, weighted=True)
        return entry.question

    assert questions("hh/helpful-base") == "helpfulness"
    assert questions("hh/train.jsonl", question="harmlessness") == "harmlessness"
    assert questions("hh/train.jsonl", "demonstrations") is None
    for kind in ("comparisons", "prompts"):
        with pytest.raises(UserError, match=r"data.train\[0\].question: expected helpfulness or harmlessness, which"):
            questions("hh/train.jsonl", kind)
    with pytest.raises(UserError, match=r"question: expected helpfulness or harmlessness, found 'both'"):
        questions("hh/helpful-base", question="both")


def test_weights_only_where_training_mixes(files):
    for stage, name in (("reward", "eval"), ("generate", "prompts"), ("evaluate", "prompts")):
        weighted = f"--data.{name}=[{{path: a, weight: 1}}]"
        with pytest.raises(UserError, match=rf"data.{name}\[0\].weight: expected none, because every row is used once"):
            parse(stage, [weighted])
    for stage, name in (("sft", "train"), ("cost", "train"), ("ppo-lag", "prompts"), ("ppo", "ptx")):
        parse(stage, [f"--data.{name}=[{{path: a, weight: 1}}]"])


def test_entries_from_a_file_and_from_the_command_line(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "data:\n  on_bad_row: skip\n  train:\n  - a.jsonl\n  - {source: pku-saferlhf, path: PKU, split: test}\n"
    )
    config = parse("reward", [f"--config={tmp_path / 'run.yaml'}"])
    assert config.data.train == ["a.jsonl", {"source": "pku-saferlhf", "path": "PKU", "split": "test"}]
    assert config.data.on_bad_row == "skip"
    assert parse("reward", ["--data.train=[a.jsonl,b.jsonl]"]).data.train == ["a.jsonl", "b.jsonl"]
    assert parse("sft", ["--data.train=[{source: alpaca, path: x}]"]).data.train == [{"source": "alpaca", "path": "x"}]
    check_entries("sft", parse("sft", []).data)  # an empty list is the stage's to refuse
    with pytest.raises(UserError, match=r"^data.train\[0\].source: expected one that gives comparisons \(plain, "):
        parse("cost", ["--data.train=[{source: alpaca, path: x}]"])


# Rows that are left out.

LABELS = {"better_response_id": 0, "safer_response_id": None, "is_response_0_safe": True}
PAIR = {"prompt": "p", "response_0": "a", "response_1": "b"}


def test_rows_without_the_label_are_counted_and_left_out(tmp_path):
    rows = [PAIR | {"better_response_id": 0}, PAIR, PAIR | {"safer_response_id": 1, "better_response_id": None}]
    path, said = write(tmp_path / "a.jsonl", rows), []
    mixture = read("comparisons", "data.train", [path], needs="better_response_id", say=said.append)
    assert [record.better_response_id for record in mixture.records] == [0]
    assert said == [f"data.train[0] {path}: 2 of 3 comparisons have no better_response_id, left out"]
    path = write(tmp_path / "b.jsonl", rows[:2])
    with pytest.raises(UserError, match=r"data.eval\[0\] .*b.jsonl: expected comparisons with safer_response_id"):
        read("comparisons", "data.eval", [path], needs="safer_response_id")


def test_bad_rows_end_the_run_or_are_counted(tmp_path):
    path, said = write(tmp_path / "a.jsonl", [{"prompt": ""}, {"prompt": "p"}, {"prompt": " "}, 7]), []
    with pytest.raises(UserError, match="a.jsonl, line 1, field 'prompt': expected a string that is not empty"):
        read("prompts", "data.prompts", [path])
    assert prompts(read("prompts", "data.prompts", [path], "skip", say=said.append).records) == ["p"]
    reason = "2 bad rows skipped, field 'prompt': expected a string that is not empty"
    assert said == [
        f"data.prompts[0] {path}: {reason} ({path}, line 1; {path}, line 3)",
        f"data.prompts[0] {path}: 1 bad rows skipped, expected a JSON object ({path}, line 4)",
    ]
    path = write(tmp_path / "b.jsonl", [{"prompt": ""}])
    with pytest.raises(UserError, match="b.jsonl: expected prompts, found none: 1 bad rows skipped, field 'prompt'"):
        read("prompts", "data.prompts", [path], "skip")


def test_what_a_source_leaves_out_is_said(tmp_path):
    rows = [{"prompt": "p", "response": f"r{n}", "is_safe": n > 0, "category": {}} for n in range(3)]
    path, said = write(tmp_path / "a.jsonl", rows), []
    mixture = read("comparisons", "data.train", [{"path": path, "source": "beavertails"}], say=said.append)
    assert len(mixture.records) == 1 and said == [f"data.train[0] {path}: 1 answers that make no pair, left out"]
