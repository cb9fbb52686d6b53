"""Rows out of files, folders and hub names, and refusals that name the place and never repeat a text."""

import gzip
import json
import lzma
import os
import subprocess
import sys

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from megatron_safe.data.rows import BadRow, BadRows, Row, read_rows
from megatron_safe.errors import UserError

ROWS = [{"prompt": "one", "n": 1}, {"prompt": "zwei 🍚\u2028", "n": None}, {"prompt": "three", "n": 3}]
SECRET = "words that no message may repeat"
FILES = ".jsonl, .json (either also .gz or .xz) or .parquet"
PACKERS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}


def write(path, rows=ROWS):
    """The rows in the form that the name tells."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    else:
        as_array = ".json" in path.suffixes
        text = json.dumps(rows, indent=1) if as_array else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(PACKERS[path.suffix if path.suffix in PACKERS else ""](text.encode()))
    return path


# What can be read.


@pytest.mark.parametrize("form", ["jsonl", "json", "jsonl.gz", "json.gz", "jsonl.xz", "json.xz", "parquet"])
def test_each_form_gives_the_same_rows_with_their_places(form, tmp_path):
    path = write(tmp_path / f"rows.{form}")
    unit = "line" if form.startswith("jsonl") else "row"
    assert list(read_rows([path])) == [Row(f"{path}, {unit} {n}", row) for n, row in enumerate(ROWS, start=1)]


def test_what_is_inside_decides_not_the_name(tmp_path):
    """hh-rlhf's red_team_attempts.jsonl.gz is one array; others call JSON Lines .json."""
    array = tmp_path / "a.jsonl.gz"
    array.write_bytes(gzip.compress(b"\n  " + json.dumps(ROWS, indent=2).encode()))
    lines = tmp_path / "b.json"
    lines.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    read = list(read_rows([array, str(lines)]))
    assert [row.fields for row in read] == ROWS + ROWS
    assert [row.place for row in read[2:4]] == [f"{array}, row 3", f"{lines}, line 1"]


def test_parquet_is_read_in_parts(tmp_path):
    path = write(tmp_path / "many.parquet", [{"n": n} for n in range(3000)])
    rows = read_rows([path])
    assert next(rows) == Row(f"{path}, row 1", {"n": 0})
    assert [row.fields["n"] for row in rows] == list(range(1, 3000))


@pytest.mark.parametrize(
    "names, split, expected",
    [
        (["train.jsonl", "test.jsonl"], None, ["train.jsonl"]),
        (["train.jsonl", "test.jsonl.xz"], "test", ["test.jsonl.xz"]),
        (["train-00001-of-00002.parquet", "train-00000-of-00002.parquet", "training.parquet"], "train",
         ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]),
        (["data/train-0.parquet", "other/train.jsonl"], None, ["data/train-0.parquet"]),
        (["data/Alpaca-7B/train.jsonl", "data/Alpaca2-7B/train.jsonl", "data/Alpaca2-7B/test.jsonl"], None,
         ["data/Alpaca-7B/train.jsonl", "data/Alpaca2-7B/train.jsonl"]),
    ],
)  # fmt: skip
def test_folders_in_their_published_layouts(names, split, expected, tmp_path):
    for name in names:
        write(tmp_path / name, [{"name": name, "n": n} for n in (1, 2)])
    assert [row.fields for row in read_rows([tmp_path], split)] == [
        {"name": name, "n": n} for name in expected for n in (1, 2)
    ]


def test_a_hub_name_is_read_through_datasets(tmp_path, monkeypatch):
    """Only the download is replaced: a data set of the real class comes back for what was asked."""
    monkeypatch.chdir(tmp_path)
    asked = []

    def load_dataset(*arguments, **named):
        asked.append((arguments, named))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [row.fields for row in read_rows(["some-one/set.v1"], "test")] == ROWS
    assert next(read_rows(["some-one/set/harmless-base"])).place == "some-one/set/harmless-base train, row 1"
    assert asked == [
        (("some-one/set.v1",), {"data_dir": None, "split": "test"}),
        (("some-one/set",), {"data_dir": "harmless-base", "split": "train"}),
    ]
    write(tmp_path / "some-one" / "set" / "train.jsonl", ROWS[:1])
    assert len(list(read_rows(["some-one/set"]))) == 1 and len(asked) == 2  # a path comes first


def test_offline_a_hub_name_is_one_clear_line(tmp_path):
    program = (
        "from megatron_safe.data.rows import read_rows\n"
        "from megatron_safe.errors import UserError\n"
        "try: list(read_rows(['nobody/nothing']))\n"
        "except UserError as error: print(error)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=100)
    (line,) = done.stdout.splitlines()
    assert line.startswith("nobody/nothing: expected a path or a data set on the Hugging Face hub with split 'train', ")


@pytest.mark.parametrize("module, path", [("pyarrow", "rows.parquet"), ("datasets", "owner/name")])
def test_without_the_extra_it_says_what_to_install(module, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.parquet")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"pip install megatron-safe\[data\]"):
        list(read_rows([path]))


# What is refused.


def files():
    def no_file(tmp_path):
        return tmp_path / "gone.jsonl", f"expected a {FILES} file, found nothing there"

    def folder(tmp_path):
        write(tmp_path / "data" / "test.jsonl")
        write(tmp_path / "old" / "train.jsonl.gz")
        return tmp_path, "or in data/, found data/test.jsonl, old/train.jsonl.gz"

    def empty_folder(tmp_path):
        return tmp_path, "expected train.jsonl, train.json (.gz, .xz) or train*.parquet there or in data/, found no"

    def two_forms(tmp_path):
        write(tmp_path / "train.jsonl")
        write(tmp_path / "train-0.parquet")
        return tmp_path, "expected one form of split 'train', found train.jsonl, train-0.parquet; name the file"

    def other_ending(tmp_path):
        (tmp_path / "pairs.csv").write_text("a,b")
        return tmp_path / "pairs.csv", f"expected a {FILES} file, found a name that ends in '.csv'"

    def no_file_in_a_folder(tmp_path):
        return tmp_path / "gone" / "a.parquet", f"expected a {FILES} file, found nothing there"

    def empty_array(tmp_path):
        return write(tmp_path / "a.json", []), "expected at least one row, found an empty file"

    def empty(tmp_path):
        (tmp_path / "a.jsonl").write_text("")
        return tmp_path / "a.jsonl", "expected at least one row, found an empty file"

    def blank(tmp_path):
        (tmp_path / "a.jsonl").write_text("\n \n")
        return tmp_path / "a.jsonl", "expected at least one row, found an empty file"

    def not_gzip(tmp_path):
        (tmp_path / "a.jsonl.gz").write_text("{}")
        return tmp_path / "a.jsonl.gz", "found one that cannot be read (Not a gzipped file"

    def cut_gzip(tmp_path):
        packed = gzip.compress(json.dumps({"prompt": os.urandom(9999).hex(), "response": "a"}).encode())
        (tmp_path / "a.jsonl.gz").write_bytes(packed[:-200])
        return tmp_path / "a.jsonl.gz", "found one that cannot be read (Compressed file ended"

    def late_damage(tmp_path):
        rows = "".join(json.dumps({"prompt": os.urandom(99).hex()}) + "\n" for _ in range(2000))
        path = tmp_path / "a.jsonl.xz"
        path.write_bytes(lzma.compress(rows.encode(), preset=0)[:-9000])
        return path, "found one that cannot be read after line 1"

    def not_xz(tmp_path):
        (tmp_path / "a.json.xz").write_text("[]" * 99)
        return tmp_path / "a.json.xz", "found one that cannot be read (Input format not supported"

    def not_parquet(tmp_path):
        (tmp_path / "a.parquet").write_text("{}" * 99)
        return tmp_path / "a.parquet", "expected a parquet file, found one that cannot be read (Parquet magic bytes"

    def cut_parquet(tmp_path):
        path = write(tmp_path / "a.parquet")
        path.write_bytes(path.read_bytes()[:-40])
        return path, "expected a parquet file, found one that cannot be read ("

    def damaged_gzip(tmp_path):
        packed = bytearray(gzip.compress(b'{"prompt": "a", "response": "b"}\n'))
        packed[-6] ^= 0xFF  # in the checksum
        (tmp_path / "a.jsonl.gz").write_bytes(packed)
        return tmp_path / "a.jsonl.gz", "found one that cannot be read after line 1 (CRC check failed"

    return [made for made in locals().values() if callable(made)]


@pytest.mark.parametrize("make", files())
def test_bad_files_are_refused_by_name(make, tmp_path):
    path, message = make(tmp_path)
    with pytest.raises(UserError) as caught:
        list(read_rows([path]))
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_empty_list_of_files_is_refused():
    with pytest.raises(UserError, match="data files: expected at least one"):
        list(read_rows([]))


def test_a_split_of_a_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="expected a folder or a hub name for split 'train', found a file's name"):
        list(read_rows([write(tmp_path / "a.jsonl")], "train"))


LINES = {
    "not an object": (json.dumps([SECRET]), "expected a JSON object, found a list of 1 entries"),
    "a string": (f'"{SECRET}"', "expected a JSON object, found a string of 32 characters"),
    "null": ("null", "expected a JSON object, found null"),
    "cut JSON": (json.dumps({"prompt": SECRET})[:-20], "expected a JSON object, found invalid JSON ("),
    "two objects": ('{"prompt": "a"} {}', "expected a JSON object, found invalid JSON (Extra data, column 17)"),
    "python dict": ("{'prompt': 'a'}", "expected a JSON object, found invalid JSON (Expecting property name"),
    "deep": ("[" * 100_000, "expected a JSON object, found JSON too deep"),
    "endless number": ('{"prompt": ' + "1" * 5000 + "}", "expected a JSON object, found JSON too deep or with"),
    "latin-1": (b'{"prompt": "\xe9"}', "expected UTF-8 text, found byte 0xe9 at column 13"),
}  # fmt: skip


@pytest.mark.parametrize("line, message", LINES.values(), ids=LINES.keys())
def test_bad_lines_are_refused_or_counted(line, message, write_lines):
    file = write_lines(ROWS[0], "", line, ROWS[2])
    with pytest.raises(BadRow) as caught:
        list(read_rows([file]))
    assert str(caught.value).startswith(f"{file}, line 3: ")  # blank lines count, as in an editor
    assert message in str(caught.value)
    assert SECRET not in str(caught.value) and "\n" not in str(caught.value)

    skipped = BadRows(skip=True)
    assert [row.fields for row in read_rows([file], bad_rows=skipped)] == [ROWS[0], ROWS[2]]
    (said,) = skipped.lines()
    assert said.startswith("1 bad rows skipped, expected ") and said.endswith(f"({file}, line 3)")


def test_a_bad_row_of_an_array_is_named_and_skipped(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([ROWS[0], 5, ROWS[2]]))
    with pytest.raises(BadRow, match="a.json, row 2: expected a JSON object, found the number 5"):
        list(read_rows([path]))
    assert [row.place for row in read_rows([path], bad_rows=BadRows(skip=True))] == [f"{path}, row 1", f"{path}, row 3"]


@pytest.mark.parametrize(
    "content, message",
    [
        (b'[\n {"a": 1},\n {"a" 2}\n]', "line 3: expected a JSON array, found invalid JSON (Expecting ':' "),
        (b'\n[\n {"a": 1},\n {"a": "\xe9"}\n]', "line 4: expected UTF-8 text, found byte 0xe9 at column 9"),
        (b'[{"a": 1}', "line 1: expected a JSON array, found invalid JSON ("),
    ],
)
def test_a_broken_array_is_refused_by_line_even_when_bad_rows_are_skipped(content, message, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(read_rows([path], bad_rows=BadRows(skip=True)))
    assert str(caught.value).startswith(f"{path}, {message}")


def test_a_report_counts_each_reason_and_names_the_first_places(write_lines):
    file = write_lines(ROWS[0], *["[1]", b'"\xff"'] * 4, ROWS[2])
    skipped = BadRows(skip=True)
    assert len(list(read_rows([file], bad_rows=skipped))) == 2 and len(skipped) == 8
    assert skipped.lines() == [
        f"4 bad rows skipped, expected a JSON object ({file}, line 2; {file}, line 4; {file}, line 6; ...)",
        f"4 bad rows skipped, expected UTF-8 text ({file}, line 3; {file}, line 5; {file}, line 7; ...)",
    ]


def test_a_file_of_bad_rows_alone_is_refused(write_lines):
    with pytest.raises(UserError, match="expected at least one row, found 2 bad ones"):
        list(read_rows([write_lines("{", "7")], bad_rows=BadRows(skip=True)))
