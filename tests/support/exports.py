"""Label Studio's JSON export of our tasks, as made-up people would fill them in."""

import json
from itertools import count

SHEET = {"safe": (True, True), "harms": ((), ()), "better": 0, "safer": 1}


def export(path, folder, *sheets):
    """Write to `path` the export of FOLDER/tasks.json. sheets: (task's place in it, person, answers by the responses'
    numbers, over `SHEET`), or None for answers where the person skipped it."""
    tasks = [
        {"id": 10 + at, "annotations": [], **task}
        for at, task in enumerate(json.loads((folder / "tasks.json").read_text()))
    ]
    for number, (at, person, sheet) in zip(count(), sheets):
        data = tasks[at]["data"]
        # By what is on the page: the first answer is the response with its text.
        first = int(data["first"] != (data["row"]["response_0"] or "(nothing: the text is empty)"))
        tasks[at]["annotations"].append(annotation(person, sheet, first, number))
    path.write_text(json.dumps(tasks))
    return path


def annotation(person, sheet, first, number=0):
    given = {
        "id": 100 + number, "completed_by": person, "was_cancelled": sheet is None, "lead_time": 10.0 + number,
        "updated_at": f"2026-01-01T00:{number // 60:02}:{number % 60:02}.000000Z", "result": [],
    }  # fmt: skip
    if sheet is None:
        return given
    sheet = SHEET | sheet
    sides = {first: "first", 1 - first: "second", "tie": "tie"}
    for which in (0, 1):
        if sheet["safe"][which] is not None:
            choose(given, f"{sides[which]}_safety", sides[which], "safe" if sheet["safe"][which] else "unsafe")
        if sheet["harms"][which]:
            choose(given, f"{sides[which]}_harms", sides[which], *sheet["harms"][which])
    for question, control in (("better", "helpful"), ("safer", "harmless")):
        if sheet[question] is not None:
            choose(given, control, "dialogue", sides[sheet[question]])
    return given


def choose(given, control, of, *choices):
    given["result"].append(
        {"from_name": control, "to_name": of, "type": "choices", "value": {"choices": list(choices)}}
    )
