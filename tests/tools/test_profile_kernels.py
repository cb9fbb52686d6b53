"""The profiling tool runs, on a CPU too, and its numbers hang together. How fast anything is, is not tested."""

import json
import sys
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(TOOLS))  # as `python tools/profile_kernels.py` does
    try:
        import profile_kernels

        yield profile_kernels
    finally:
        sys.path.remove(str(TOOLS))


@pytest.fixture(scope="module")
def profiled(tool, tmp_path_factory):
    """(record, folder) of a run over every operation, with its JSON, picture and traces."""
    folder = tmp_path_factory.mktemp("profile")
    arguments = ["--device", "cpu", "--shapes", "tiny", "--tokens", "5", "--against", "eager", "--seconds", "0"]
    assert tool.main([*arguments, "--out", str(folder / "k.json"), "--trace", str(folder / "traces")]) == 0
    return json.loads((folder / "k.json").read_text()), folder


def test_every_operation_is_measured(tool, profiled):
    record, _ = profiled
    assert {"device", "date", "command", "operations"} <= record.keys()
    assert {row["name"].split()[0] for row in record["operations"]} == set(tool.OPERATIONS)
    for row in record["operations"]:
        assert {"name", "shape", "ms", "gb_per_s", "share_of_ceiling", "peak_bytes", "speedup"} <= row.keys()
        assert row["ms"] > 0 and row["peak_bytes"] > 0
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["ms"] / 1e6)
        assert row["speedup"]["eager"] > 0
        if "linear" in row["name"]:
            assert row["speedup"]["gemms"] > 0
        else:
            assert row["share_of_ceiling"] == pytest.approx(row["gb_per_s"] / record["copy_gb_per_s"])


def test_picture_and_traces(profiled):
    record, folder = profiled
    assert (folder / "k.png").read_bytes().startswith(b"\x89PNG")
    traces = list((folder / "traces").glob("*.json"))
    assert len(traces) == len(record["operations"])
    assert "traceEvents" in json.loads(traces[0].read_text())


def test_memory_is_that_of_the_run_alone(tool):
    held = torch.zeros(1000)
    contender = tool.Contender(lambda i: held, lambda x: (x + 1).sum())
    most = tool.peak_bytes(contender, torch.device("cpu"))
    assert 4000 <= most < 8000


def test_a_rival_that_fails_is_named_and_left_out(tool):
    def fail(_):
        raise NotImplementedError("no such thing")

    contenders = {
        "ours": tool.Contender(lambda i: i, lambda i: i), "eager": tool.Contender(lambda i: i, fail)
    }  # fmt: skip
    medians, lines = tool.measure(contenders, torch.device("cpu"), 0.0)
    assert medians.keys() == {"ours"} and lines == ["eager: NotImplementedError: no such thing, skipped"]
    with pytest.raises(NotImplementedError):
        tool.measure({"ours": contenders["eager"]}, torch.device("cpu"), 0.0)


def test_what_is_not_installed_is_named(tool, monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)  # import raises ImportError
    present, lines = tool.rivals_here(["eager", "liger"])
    assert present == {"eager"} and lines == ["liger: not installed, skipped"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--shapes", "llama-9b"], "'llama-9b'"),
        (["--against", "eager,magic"], "'magic'"),
        (["--operations", "softmax"], "'softmax'"),
        (["--tokens", "16,0"], "'16,0'"),
        (["--tokens", "many"], "'many'"),
        (["--device", "tpu9"], "tpu9"),
        (["--device", "meta"], "meta"),
        (["--seconds", "nan"], "nan"),
        (["--out", "/no/such/folder/k.json"], "/no/such/folder"),
        (["--out", "k.txt"], "k.txt"),
        (["--colour"], "--colour"),
    ],
)
def test_bad_arguments_are_one_line(tool, capsys, arguments, words):
    with pytest.raises(SystemExit) as exit:
        tool.main(["--device", "cpu", *arguments])
    assert exit.value.code == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and words in said.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_no_cuda_device(tool, capsys):
    with pytest.raises(SystemExit) as exit:
        tool.main(["--device", "cuda"])
    assert exit.value.code == 2
    assert capsys.readouterr().err == "profile_kernels: argument --device: there is no CUDA device here\n"
