"""What people are shown, and that it tells nothing about where an answer came from."""

import json
from xml.etree import ElementTree

from megatron_safe.annotation import task_of, write_tasks
from megatron_safe.data.harms import HARM_CATEGORIES


def pair(number, **more):
    return {
        "prompt": f"How do I water fern {number}?", "response_0": f"Twice {number}.", "response_1": f"Once {number}."
    } | more  # fmt: skip


def tasks(folder):
    return json.loads((folder / "tasks.json").read_text())


def test_a_task_has_the_dialogue_both_answers_and_its_row(tmp_path):
    rows = [
        pair(1, history=[["Hello", "Hello to you"], ["One more", ""]], origin={"round": 2}, response_1_ended=True),
        pair(2, response_0="", history=None),
    ]
    assert write_tasks(tmp_path / "new" / "folder", rows) == 2
    first, second = (task["data"] for task in tasks(tmp_path / "new" / "folder"))
    assert first["row"] == rows[0] and second["row"] == rows[1]
    empty = "(nothing: the text is empty)"
    assert first["dialogue"] == [
        {"speaker": "User", "text": "Hello"}, {"speaker": "Assistant", "text": "Hello to you"},
        {"speaker": "User", "text": "One more"}, {"speaker": "Assistant", "text": empty},
        {"speaker": "User", "text": rows[0]["prompt"]},
    ]  # fmt: skip
    assert {first["first"], first["second"]} == {"Twice 1.", "Once 1."}
    assert {second["first"], second["second"]} == {empty, "Once 2."}
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["labels.xml", "tasks.json"]


def test_the_order_is_drawn_and_stays(tmp_path):
    rows = [pair(number) for number in range(200)]
    for folder, given in (("a", rows), ("b", rows[::-1])):
        assert write_tasks(tmp_path / folder, given) == 200
    one, other = tasks(tmp_path / "a"), tasks(tmp_path / "b")
    assert one == other[::-1]
    kept = sum(task["data"]["first"] == task["data"]["row"]["response_0"] for task in one)
    assert 65 < kept < 135  # five standard deviations
    assert len({task["data"]["id"] for task in one}) == 200


def test_the_id_is_by_the_texts_alone(tmp_path):
    same = [pair(1), pair(1, category="theft"), pair(1, history=[])]
    assert len({task_of(one) for one in same}) == 1 and write_tasks(tmp_path, same) == 1
    assert tasks(tmp_path)[0]["data"]["row"] == same[0]
    swapped = {"response_0": "Once 1.", "response_1": "Twice 1."}
    for change in ({"prompt": "What?"}, {"response_0": "Rice."}, {"history": [["a", "b"]]}, swapped):
        assert task_of(pair(1, **change)) != task_of(pair(1))
    # Texts do not run into each other.
    assert task_of(pair(1, prompt="ab", response_0="c")) != task_of(pair(1, prompt="a", response_0="bc"))


def test_the_page_asks_the_papers_two_stages(tmp_path):
    write_tasks(tmp_path, [pair(1)])
    page = ElementTree.parse(tmp_path / "labels.xml").getroot()
    shown = {element.get("name"): element for element in page.iter() if element.get("value", "").startswith("$")}
    data = tasks(tmp_path)[0]["data"]
    assert {element.get("value")[1:] for element in shown.values()} == {"dialogue", "first", "second"} <= data.keys()
    controls = {element.get("name"): element for element in page.iter("Choices")}
    assert all(element.get("required") == "true" and element.get("toName") in shown for element in controls.values())
    choices = {
        name: [choice.get("alias") or choice.get("value") for choice in element.iter("Choice")]
        for name, element in controls.items()
    }
    harms = list(HARM_CATEGORIES)
    assert len(harms) == 14
    assert choices == {
        "first_safety": ["safe", "unsafe"], "first_harms": harms, "second_safety": ["safe", "unsafe"],
        "second_harms": harms, "helpful": ["first", "tie", "second"], "harmless": ["first", "tie", "second"],
    }  # fmt: skip
    assert list(choices) == ["first_safety", "first_harms", "second_safety", "second_harms", "helpful", "harmless"]
    for side in ("first", "second"):
        harm = controls[f"{side}_harms"]
        assert (harm.get("choice"), harm.get("whenTagName")) == ("multiple", f"{side}_safety")
        assert harm.get("whenChoiceValue") == "unsafe" and harm.get("toName") == side
