"""People as a round's annotators: what they wait for, and what of their exports is taken."""

from types import SimpleNamespace

import pytest
from exports import export

from megatron_safe.config import AnnotatorConfig
from megatron_safe.errors import UserError, Waiting
from megatron_safe.evaluation.answers import Answer
from megatron_safe.rounds.annotators import annotate
from megatron_safe.rounds.pairs import pair_rows

PAIRS = pair_rows(
    [Answer(f"how do I water fern {i}", "twice") for i in range(3)],
    [Answer(f"how do I water fern {i}", "never") for i in range(3)],
)


@pytest.fixture
def people(tmp_path):
    """people(pairs) -> the labelled rows; `people.said` is what was printed."""
    said = []
    runtime = SimpleNamespace(on_main=lambda work: work(), print=said.append)

    def run(pairs=PAIRS, least_labelled=0.6):
        config = AnnotatorConfig(kind="people", least_labelled=least_labelled)
        return annotate(config, pairs, tmp_path, 0, runtime)

    run.said = said
    return run


def test_their_exports_are_waited_for_and_then_taken(people, tmp_path):
    with pytest.raises(Waiting, match="have the 3 tasks labelled"):
        people()
    export(tmp_path / "export.json", tmp_path, (0, 1, {"better": 1}), (2, 1, {"better": "tie"}))
    export(tmp_path / "export-more.json", tmp_path, (2, 2, {"better": 0}), (2, 3, {"better": 0}))
    with pytest.raises(Waiting, match="2 of 3 tasks are labelled, and annotator.least_labelled is 0.9"):
        people(least_labelled=0.9)
    rows = people()
    assert [row["better_response_id"] for row in rows] == [1, 0]
    assert all(row.items() >= PAIRS[at].items() for at, row in zip((0, 2), rows, strict=True))
    assert people.said == [f"{tmp_path}: people labelled 2 of 3 pairs"]


def test_another_rounds_labels_are_refused(people, tmp_path):
    with pytest.raises(Waiting):
        people()
    export(tmp_path / "export.json", tmp_path, (0, 1, {}), (1, 1, {}))
    with pytest.raises(UserError, match="expected labels of this round's pairs, found 1 of 2 others"):
        people(PAIRS[1:])


def test_a_judge_labels_with_ties(tmp_path):
    (tmp_path / "lengths.py").write_text(
        "from megatron_safe.evaluation.judges import Judgement\n"
        "def judge(answers):\n"
        "    return [Judgement(len(a.response), 'x' in a.response, 'x' in a.response) for a in answers]\n"
    )
    first = [Answer("p", response) for response in ("long", "x", "same")]
    second = [Answer("p", response) for response in ("a", "ok", "more")]
    runtime = SimpleNamespace(on_main=lambda work: work(), print=print)
    config = AnnotatorConfig(kind="judge")
    config.judge.kind, config.judge.program.path = "program", f"{tmp_path / 'lengths.py'}:judge"
    rows = annotate(config, pair_rows(first, second), tmp_path, 0, runtime)
    assert [row["better_response_id"] for row in rows] == [0, 1, "tie"]
    assert [row["safer_response_id"] for row in rows] == ["tie", 1, "tie"]
    assert [(row["is_response_0_safe"], row["is_response_1_safe"]) for row in rows] == [
        (True, True), (False, True), (True, True)
    ]  # fmt: skip
