"""The profiling tool runs, on a CPU too, and its numbers hang together. How fast anything is, is not tested."""

import json
import sys
from collections import deque
from pathlib import Path

import pytest
import torch

from megatron_safe.kernels.lagrangian import lagrange_state, lagrange_step
from megatron_safe.kernels.ppo_lag_loss import ppo_lag_loss
from megatron_safe.kernels.shaped_gae import shaped_gae

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


def flat(result) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else [x for part in result for x in flat(part)]


@pytest.mark.parametrize(
    "operation",
    [
        "vocab_parallel_logprob", "ppo_lag_loss", "linear_logprob", "linear_ppo_lag_loss", "shaped_gae", "value_loss",
        "decode_attention",
    ],  # fmt: skip
)
def test_eager_computes_what_the_kernel_does(tool, operation):
    """Losses, gradients, contexts, ...: of a rival that computes something else, the ratio would mean nothing."""
    torch.manual_seed(0)
    shape = tool.SHAPES["tiny"].with_tokens([7])
    cases = list(tool.OPERATIONS[operation](operation, shape, tool.Inputs(torch.device("cpu"), 0), {"eager"}))
    assert cases
    for case in cases:
        ours, eager = (flat(case.contenders[name].run(case.contenders[name].prepare(0))) for name in ("ours", "eager"))
        assert any(x.abs().max() > 1e-3 for x in eager)
        for x, expected in zip(ours, eager, strict=operation != "shaped_gae"):  # which also returns sums
            torch.testing.assert_close(x.detach(), expected.detach(), atol=2e-4, rtol=2e-4)


def test_eager_masks_statistics_and_lambda(tool):
    """What the cases leave out: padding, the loss's statistics, whole answers of λ and of a sampled token."""
    import eager

    torch.manual_seed(0)
    mask_BT = torch.tensor([[0, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)
    draws = [torch.randn(4, 5) for _ in range(4)]
    inputs = *draws[:2], torch.randn(4), torch.randn(4), *draws[2:], mask_BT, 0.3, 1.0, 0.9, 0.8
    for x, y in zip(shaped_gae(*inputs)[:4], eager.eager_gae(*inputs), strict=True):
        torch.testing.assert_close(x, y)

    mask_N = mask_BT.flatten()
    inputs = [torch.randn(20, 9), torch.arange(20) % 9, -2 + torch.randn(20), torch.randn(20), torch.randn(20)]
    inputs += [mask_N, mask_N / 3, torch.tensor(0.7), 0.2]
    for x, y in zip(ppo_lag_loss(*inputs), eager.eager_loss(*inputs), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5, check_dtype=False)

    rule = dict(lambda_lr=0.3, threshold=0.1, lambda_min=0.8, lambda_max=1.2)
    state, lambda_, costs_W = lagrange_state(1.0, 5, "cpu"), 1.0, deque(maxlen=5)
    seen = set()
    for costs_B in (*torch.randn(6, 3), torch.full((3,), 9.0), torch.full((9,), -9.0)):
        lagrange_step(state, costs_B, None, True, **rule)
        lambda_ = eager.eager_lagrange_step(lambda_, costs_W, costs_B, **rule)
        assert lambda_ == pytest.approx(state.lambda_1.item(), rel=1e-12)
        seen.add(lambda_)
    assert {0.8, 1.2} < seen

    tokens_N, log_probs_N = eager.eager_sample(inputs[0])
    torch.testing.assert_close(log_probs_N, eager.eager_logprob(inputs[0], tokens_N)[0])


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
