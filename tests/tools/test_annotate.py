"""tools/annotate.py, as a person uses it: pairs to tasks, exports to labels, and that it shows no text."""

import dataclasses
import json
import signal
import sys
from pathlib import Path

import pytest
from exports import export

from megatron_safe.evaluation.answers import Answer

TOOLS = Path(__file__).resolve().parents[2] / "tools"
SECRET = "zyxwv"


@pytest.fixture(scope="module")
def main():
    handler = signal.getsignal(signal.SIGTERM)
    sys.path.insert(0, str(TOOLS))
    try:
        import annotate

        yield annotate.main
    finally:
        sys.path.remove(str(TOOLS))
        signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def tool(main, capsys):
    """tool(*arguments) -> exit code, stdout, stderr; neither repeats a text."""

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        assert SECRET not in said.out + said.err
        return code, said.out, said.err

    return run


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers(path, *given):
    """given: (prompt, response)."""
    made = [Answer(f"{SECRET} {prompt}", f"{SECRET} {response}", category="theft") for prompt, response in given]
    return write(path, map(dataclasses.asdict, made))


def rows(folder):
    return [task["data"]["row"] for task in json.loads((folder / "tasks.json").read_text())]


def pairs(folder):
    return [tuple(row[name].removeprefix(f"{SECRET} ") for name in PAIR) for row in rows(folder)]


PAIR = "prompt", "response_0", "response_1"


def test_comparisons_keep_their_fields(tool, tmp_path):
    pair = {"prompt": f"{SECRET} a", "response_0": "", "response_1": f"{SECRET} b", "safer_response_id": 1}
    turns = [("user", f"{SECRET} one"), ("assistant", f"{SECRET} two"), ("user", f"{SECRET} three")]
    messages = {"messages": [{"role": role, "content": text} for role, text in turns]}
    dialogue = {**messages, "response_0": f"{SECRET} c", "response_1": f"{SECRET} d"}
    code, out, _ = tool("export", write(tmp_path / "pairs.jsonl", [pair, dialogue, pair]), "--out", tmp_path / "out")
    assert code == 0 and "1 pairs that came before, left out\n2 tasks -> " in out
    assert rows(tmp_path / "out") == [
        pair | {"history": []},
        {
            "prompt": f"{SECRET} three", "history": [[f"{SECRET} one", f"{SECRET} two"]],
            "response_0": f"{SECRET} c", "response_1": f"{SECRET} d",
        },
    ]  # fmt: skip


def test_samples_of_one_policy(tool, tmp_path):
    given = [("p", "1"), ("p", "2"), ("q", "3"), ("p", "4"), ("p", "5"), ("q", "6"), ("q", "7"), ("r", "8")]
    code, out, _ = tool("export", answers(tmp_path / "answers.jsonl", *given), "--out", tmp_path / "out")
    assert code == 0 and "2 answers without a partner, left out\n3 tasks" in out
    assert pairs(tmp_path / "out") == [("p", "1", "2"), ("p", "4", "5"), ("q", "3", "6")]
    assert rows(tmp_path / "out")[0]["category"] == "theft"


def test_answers_of_two_policies(tool, tmp_path):
    one = answers(tmp_path / "one.jsonl", ("p", "1"), ("q", "2"), ("p", "3"))
    other = answers(tmp_path / "other.jsonl", ("q", "4"), ("p", "5"), ("r", "6"))
    code, out, _ = tool("export", one, other, "--out", tmp_path / "out")
    assert code == 0 and "2 answers without a partner, left out\n2 tasks" in out
    assert pairs(tmp_path / "out") == [("p", "1", "5"), ("q", "2", "4")]


def test_import_writes_labels_and_prints_how_good_they_are(tool, tmp_path):
    pairs = [{"prompt": f"{SECRET} {i}", "response_0": f"{SECRET} a", "response_1": f"{SECRET} b"} for i in range(3)]
    assert tool("export", write(tmp_path / "pairs.jsonl", pairs), "--out", tmp_path)[0] == 0
    people = [{"id": number, "email": f"{SECRET}{number}@example.org"} for number in range(3)]
    theft = {"safe": (True, False), "harms": ((), ("financial_crime,property_crime,theft",)), "safer": 0}
    sheets = [(at, person, {"better": "tie"} if at else {"better": 1}) for at in range(2) for person in people[:2]]
    sheets += [(0, people[2], {"better": 0}), (1, people[2], {"better": "tie"} | theft), (2, people[2], None)]
    path = export(tmp_path / "export.json", tmp_path, *sheets)
    code, out, _ = tool("import", path, "--out", tmp_path / "labels")
    assert code == 0
    # helpful: votes 1, 1, 0 and tie, tie, tie. Alpha by hand: coincidences 1-1, 1-0 and 0-1 one each, tie-tie three; of
    # n = 6 two are 1, one 0, three tie, so 1 - 5 * 2 / (36 - 14) = 6 / 11.
    for line in (
        "3 tasks, 1 of them without an annotation; 6 annotations count, 0 superseded, 1 skipped",
        "better_response_id 0.545 0.667 2 1 1, tie 1",
        "harm: financial_crime,property_crime,theft 0.000 0.833 4 0",
        "annotator 3 2 1 14 helpful 0.500 of 2, harmless 0.500 of 2, safe 0.750 of 4",
        "0 labels undecided by even votes, 0 contradictions, 0 unsafe answers without a kind of harm",
    ):
        assert line in " ".join(out.split())
    found = [json.loads(line) for line in (tmp_path / "labels" / "comparisons.jsonl").read_text().splitlines()]
    assert [row["better_response_id"] for row in found] == [1, "tie"] and found[0].items() >= pairs[0].items()
    report = (tmp_path / "labels" / "report.json").read_text()
    assert json.loads(report)["skipped"] == 1 and SECRET not in report
    assert sorted(path.name for path in (tmp_path / "labels").iterdir()) == ["comparisons.jsonl", "report.json"]


def test_names_on_request(main, tmp_path, capsys):
    write(tmp_path / "pairs.jsonl", [{"prompt": "p", "response_0": "a", "response_1": "b"}])
    main(["export", str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path)])
    path = export(tmp_path / "export.json", tmp_path, (0, {"id": 1, "email": "someone@example.org"}, {}))
    assert main(["import", str(path), "--out", str(tmp_path / "labels"), "--names"]) == 0
    assert "someone@example.org" in capsys.readouterr().out


def test_what_is_refused_is_one_line_and_leaves_what_was_there(tool, tmp_path):
    good = write(tmp_path / "good.jsonl", [{"prompt": "p", "response_0": "a", "response_1": "b"}])
    assert tool("export", good, "--out", tmp_path / "old")[0] == 0
    pair = {"prompt": "p", "response_0": SECRET, "response_1": SECRET}
    bad = write(tmp_path / "bad.jsonl", [pair, {"prompt": SECRET}])
    one = answers(tmp_path / "one.jsonl", ("p", "1"))
    other = answers(tmp_path / "other.jsonl", ("q", "1"))
    text = write(tmp_path / "text.jsonl", [{"text": SECRET}])
    skipped = export(tmp_path / "skipped.json", tmp_path / "old", (0, 1, None))
    minimal = tmp_path / "minimal.json"
    minimal.write_text(json.dumps([{"id": 3, "first": SECRET, "helpful": "tie"}]))
    labels = tmp_path / "labels"
    labels.mkdir()
    kept = write(labels / "comparisons.jsonl", [])
    before = {path: path.read_bytes() for path in (kept, *(tmp_path / "old").iterdir())}
    new = tmp_path / "new"
    for arguments, message in (
        (("export", good, "--out", tmp_path / "old"), "holds tasks.json already; choose another folder"),
        (("export", bad, "--out", new), "bad.jsonl, line 2, field 'response_0': expected a string, found no such"),
        (("export", one, "--out", new), "expected two answers to one prompt, found none among 1; one file needs"),
        (("export", one, other, "--out", new), "expected two answers to one prompt, found none among 2"),
        (("export", one, one, one, "--out", new), "expected one or two files of answers, found 3"),
        (("export", text, "--out", new), "text.jsonl, line 1: expected 'response_0' (a comparison) or 'response'"),
        (("export", tmp_path / "none.jsonl", "--out", new), "found nothing there"),
        (("export", good, "--out", good / "x"), "labels.xml: cannot be written: "),
        (("import", skipped, "--out", labels), "skipped.json: expected annotations, found none in 1 tasks"),
        (("import", minimal, "--out", labels), "minimal.json, row 1 (task 3), field 'data': expected an object"),
        (("import", good, "--out", labels), "good.jsonl, line 1 (task None), field 'data': expected an object"),
    ):
        code, _, said = tool(*arguments)
        assert code == 2 and said.startswith("annotate: error: ") and message in said and said.count("\n") == 1
    assert not new.exists() and {path: path.read_bytes() for path in before} == before
    assert [path.name for path in labels.iterdir()] == ["comparisons.jsonl"]
