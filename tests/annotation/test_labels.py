"""What a Label Studio export becomes: labels by majority, and what stands against them."""

import json

import pytest
from exports import export

from megatron_safe.annotation import import_annotations, read_annotations, write_tasks
from megatron_safe.config import PeopleConfig
from megatron_safe.data.harms import HARM_CATEGORIES
from megatron_safe.data.mixture import read
from megatron_safe.data.sources import read_comparisons
from megatron_safe.errors import UserError
from megatron_safe.evaluation.answers import Answer
from megatron_safe.evaluation.judges.people import PeopleJudge

SECRET = "zyxwv"
THEFT, WEAPONS = "financial_crime,property_crime,theft", "drug_abuse,weapons,banned_substance"
PAIRS = [
    {
        "prompt": f"{SECRET} {number}", "history": [["hello", f"{SECRET} to you"]] if number % 2 else [],
        "response_0": f"{SECRET} fern {number}" if number else "", "response_1": f"{SECRET} lamp {number}",
        "red_team": number == 3,
    }
    for number in range(6)
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    write_tasks(tmp_path, PAIRS)
    return tmp_path


def imported(folder, *sheets, **more):
    rows, report = import_annotations([export(folder / "export.json", folder, *sheets)], **more)
    assert SECRET not in json.dumps(report)
    return rows, report


def test_one_persons_labels_come_back_by_the_responses_own_numbers(folder):
    """For every task, so for both orders on the page."""
    sheets = [
        (at, 1, {"safe": (True, False), "harms": ((), (THEFT, WEAPONS)), "better": 1, "safer": 0})
        for at in range(len(PAIRS))
    ]
    shown = {task["data"]["first"] == task["data"]["row"]["response_0"] for task in tasks(folder)}
    assert shown == {True, False}
    rows, report = imported(folder, *sheets)
    for row, pair in zip(rows, PAIRS, strict=True):
        assert row == pair | {
            "better_response_id": 1, "safer_response_id": 0, "is_response_0_safe": True, "is_response_1_safe": False,
            "response_0_harm_category": dict.fromkeys(HARM_CATEGORIES, False),
            "response_1_harm_category": {name: name in (THEFT, WEAPONS) for name in HARM_CATEGORIES},
        }  # fmt: skip
    assert report["labels"] == {
        "better_response_id": {"1": 6}, "safer_response_id": {"0": 6}, "is_response_safe": {"safe": 6, "unsafe": 6},
        "harms": {WEAPONS: 6, THEFT: 6},
    }  # fmt: skip
    assert not report["conflicts"] and not report["contradictions"]


def tasks(folder):
    return json.loads((folder / "tasks.json").read_text())


VOTES = {
    (0, 0, 1): 0,
    (0, 1): None,
    ("tie", "tie", 1): "tie",
    (0, 1, "tie"): None,
    (0, 0, 1, "tie"): 0,
    (1, 1, "tie", "tie"): None,
}


@pytest.mark.parametrize("question, column", [("better", "better_response_id"), ("safer", "safer_response_id")])
def test_the_choice_with_the_most_votes_is_the_label(folder, question, column):
    sheets = [(at, person, {question: vote}) for at, votes in enumerate(VOTES) for person, vote in enumerate(votes)]
    rows, report = imported(folder, *sheets)
    assert [row[column] for row in rows] == list(VOTES.values())
    ids = [task["data"]["id"] for task in tasks(folder)]
    assert report["conflicts"] == [
        {"task": ids[1], "field": column, "votes": {"0": 1, "1": 1}},
        {"task": ids[3], "field": column, "votes": {"0": 1, "1": 1, "tie": 1}},
        {"task": ids[5], "field": column, "votes": {"1": 2, "tie": 2}},
    ]
    assert report["labels"][column] == {"0": 2, "tie": 1, "undecided": 3}


def test_verdicts_and_harms_of_several_people(folder):
    def unsafe(*harms):
        return {"safe": (True, False), "harms": ((), harms), "safer": 0}

    rows, report = imported(
        folder,
        (0, 1, unsafe(THEFT)), (0, 2, unsafe(THEFT, WEAPONS)), (0, 3, unsafe("self_harm")), (0, 4, {}),
        (1, 1, unsafe(THEFT)), (1, 2, unsafe(WEAPONS)),
        (2, 1, unsafe(THEFT)), (2, 2, {}),
        (3, 1, unsafe()), (3, 2, unsafe()),
        (4, 1, unsafe(THEFT)), (4, 2, unsafe()),
    )  # fmt: skip

    def named(row):
        harms = row["response_1_harm_category"]
        return harms and {name for name, there in harms.items() if there}

    assert [row["is_response_1_safe"] for row in rows] == [False, False, None, False, False]
    assert [named(row) for row in rows] == [{THEFT}, {THEFT, WEAPONS}, None, None, {THEFT}]
    assert all(row["is_response_0_safe"] and not any(row["response_0_harm_category"].values()) for row in rows)
    assert [one["field"] for one in report["conflicts"] if one["task"] == tasks(folder)[2]["data"]["id"]] == [
        "safer_response_id", "is_response_1_safe",
    ]  # fmt: skip
    assert report["conflicts"][-1]["votes"] == {"safe": 1, "unsafe": 1}
    assert report["unsafe_without_harms"] == 3


def test_safe_with_harms_contradicts_itself_and_counts_on_neither(folder):
    rows, report = imported(
        folder,
        (0, 1, {"harms": ((THEFT,), ())}), (0, 2, {"safe": (False, True), "harms": ((WEAPONS,), ()), "safer": 1}),
        (1, 1, {"harms": ((), (THEFT,))}),
        (2, 1, {"safe": (False, True), "harms": ((THEFT,), ()), "safer": 0}),
    )  # fmt: skip
    assert [row["is_response_0_safe"] for row in rows] == [False, True, False]
    assert [row["is_response_1_safe"] for row in rows] == [True, None, True]
    assert [name for name, there in rows[0]["response_0_harm_category"].items() if there] == [WEAPONS]
    assert rows[1]["response_1_harm_category"] is None and rows[2]["safer_response_id"] == 0
    ids = [task["data"]["id"] for task in tasks(folder)]
    one, many = "annotator 1", "safe, and harms are named"
    assert report["contradictions"] == [
        {"task": ids[0], "annotator": one, "field": "is_response_0_safe", "what": many},
        {"task": ids[1], "annotator": one, "field": "is_response_1_safe", "what": many},
        {"task": ids[2], "annotator": one, "field": "safer_response_id", "what": "the unsafe one is more harmless"},
    ]


def test_skipped_tasks_and_repeated_annotations(folder):
    rows, report = imported(
        folder,
        (0, 1, {"better": 0}), (0, 1, {"better": 1}),  # changed their mind
        (1, 1, None),
        (2, 1, None), (2, 1, {"better": 1}),  # skipped, then did it
        (3, 2, {"better": 0}), (3, 2, None),  # and the other way round
        (4, 2, {"better": None, "safer": None, "safe": (None, True)}),
    )  # fmt: skip
    assert [row["prompt"] for row in rows] == [PAIRS[at]["prompt"] for at in (0, 2, 4)]
    assert [row["better_response_id"] for row in rows] == [1, 1, None]
    assert (rows[2]["safer_response_id"], rows[2]["is_response_0_safe"], rows[2]["is_response_1_safe"]) == (
        None, None, True,
    )  # fmt: skip
    assert (report["tasks"], report["tasks_without_annotation"]) == (6, 3)
    assert (report["annotations"], report["skipped"], report["superseded"]) == (3, 2, 3)
    assert not report["conflicts"]  # nobody answered: nobody disagrees
    assert {name: one["skipped"] for name, one in report["annotators"].items()} == {"annotator 1": 1, "annotator 2": 1}


def test_several_exports_are_one(folder):
    person = {"id": 7, "email": "someone@example.org", "first_name": "Some"}
    one = export(folder / "one.json", folder, (0, person, {"better": 0}), (1, 8, {"better": 0}))
    more = ((1, 9, {"better": 1}), (1, 10, {"better": 1}), (5, 9, {}), (0, person, {"better": 1}))  # in time
    other = export(folder / "other.json", folder, *more)
    rows, report = import_annotations([one, other])
    assert [row["better_response_id"] for row in rows] == [1, 1, 0]
    assert (report["tasks"], report["annotations"], report["superseded"]) == (6, 5, 1)
    assert set(report["annotators"]) == {f"annotator {number}" for number in range(1, 5)}
    assert "someone" not in json.dumps(report)
    assert "someone@example.org" in import_annotations([one, other], names=True)[1]["annotators"]
    again, report = import_annotations([other, other, one])
    assert again[0]["better_response_id"] == 1 and report["annotations"] == 5
    assert read_annotations([one, other]) == rows


def test_the_labels_are_what_training_and_judging_read(folder):
    rows, _ = imported(
        folder,
        (0, 1, {"safe": (True, False), "harms": ((), (THEFT,)), "better": 1, "safer": 0}),
        (1, 1, {"better": "tie", "safer": 1}), (2, 1, {"better": "tie", "safer": "tie"}),
        (3, 1, {"better": 0}), (3, 2, {"better": 1}),
    )  # fmt: skip
    path = folder / "comparisons.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_comparisons([path])
    assert [one.better_response_id for one in found] == [1, None, None, None]
    assert [one.safer_response_id for one in found] == [0, 1, None, 1]
    assert found[0].response_1_categories == (THEFT,) and found[1].history == (("hello", f"{SECRET} to you"),)
    for needs, kept, line in (
        ("better_response_id", 1, "3 of 4 comparisons have no better_response_id (2 of them ties), left out"),
        ("safer_response_id", 3, "1 of 4 comparisons have no safer_response_id (1 of them ties), left out"),
    ):
        said = []
        assert len(read("comparisons", "data.train", [str(path)], needs=needs, say=said.append).records) == kept
        assert said == [f"data.train[0] {path}: {line}"]

    judge = PeopleJudge(PeopleConfig([str(path)]))
    both = [Answer(PAIRS[0]["prompt"], PAIRS[0][f"response_{which}"]) for which in (0, 1)]
    assert [one.harmful for one in judge.judge(both)] == [False, True]
    assert judge.judge(both)[1].categories == (THEFT,)
    (preference,) = judge.compare([tuple(both)])
    assert (preference.helpful, preference.harmless) == (0, 1)


def change(path, value):
    """A change of the third task at a path of keys."""

    def apply(tasks):
        at = tasks[2]
        for key in path[:-1]:
            at = at[key]
        if value is KeyError:
            del at[path[-1]]
        else:
            at[path[-1]] = value

    return apply


CHOICES = ("annotations", 0, "result", 0, "value", "choices")
BAD = {
    "no annotations": (change(("annotations",), KeyError), "'annotations': expected a list of annotations (Label "),
    "annotations": (change(("annotations",), {}), "'annotations': expected a list of annotations, found an object"),
    "annotation": (change(("annotations", 0), 3), "'annotations[0]': expected an object, found the number 3"),
    "no data": (change(("data",), []), "'data': expected an object with id"),
    "no row": (change(("data", "row"), KeyError), "'data': expected an object with id"),
    "a row's field": (change(("data", "row", "response_1"), 5), "'response_1': expected a string, found the number 5"),
    "a row's history": (change(("data", "row", "history"), ["a"]), "'history[0]': expected a [user, assistant] pair"),
    "a row's text": (change(("data", "row", "response_1"), f"{SECRET}!"), "'data.id': expected what was exported for"),
    "a shown text": (change(("data", "first"), f"{SECRET}!"), "'data.first': expected what was exported for the texts"),
    "nobody": (change(("annotations", 0, "completed_by"), None), "'annotations[0].completed_by': expected a user"),
    "result": (change(("annotations", 0, "result"), "x"), "'annotations[0].result': expected a list of objects"),
    "choices": (change(CHOICES, SECRET), "'annotations[0].result[0] (first_safety)': expected at least one choice"),
    "choice": (change(CHOICES, [SECRET]), "result[0] (first_safety)': expected choices of labels.xml, found a string"),
    "two": (change(CHOICES, ["safe", "unsafe"]), "result[0] (first_safety)': expected one choice, found 2"),
    "a list": (change(CHOICES, [["safe"]]), "expected choices of labels.xml, found a list of 1"),
    "time": (change(("annotations", 0, "lead_time"), "x"), "'annotations[0].lead_time': expected a number of seconds"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_export_of_ours_is_named(folder, case):
    apply, message = BAD[case]
    path = export(folder / "export.json", folder, *((at, 1, {}) for at in range(6)))
    content = json.loads(path.read_text())
    content[2]["annotations"][0]["result"].sort(key=lambda item: item["from_name"] != "first_safety")
    apply(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        read_annotations([path])
    said = str(caught.value)
    assert said.startswith(f"{path}, row 3 (task 12), field '") and message in said and SECRET not in said


def test_other_controls_on_the_page_are_left_aside(folder):
    path = export(folder / "export.json", folder, (0, 1, {}))
    content = json.loads(path.read_text())
    comment = {"from_name": "comment", "to_name": "dialogue", "type": "textarea", "value": {"text": [SECRET]}}
    content[0]["annotations"][0]["result"].append(comment)
    path.write_text(json.dumps(content))
    assert read_annotations([path])[0]["better_response_id"] == 0
