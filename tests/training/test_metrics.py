import io
import json
import math
import re
import sys
import time
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_safe.errors import UserError
from megatron_safe.training import metrics
from megatron_safe.training.metrics import MetricsLog, PhaseTimer, peak_memory_gib


def opened(folder, stage="sft", total_steps=10, is_writer=True, tensorboard=False, **more) -> MetricsLog:
    return MetricsLog(folder, stage, total_steps, is_writer, tensorboard, **more)


def read(folder) -> list[dict]:
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n") or not text
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when a test says so: `clock.now += 3`."""
    clock = types.SimpleNamespace(now=1000.0)
    monkeypatch.setattr(
        metrics, "time", types.SimpleNamespace(monotonic=lambda: clock.now, perf_counter=lambda: clock.now)
    )
    return clock


# metrics.jsonl.


def test_each_step_is_one_line_at_once(tmp_path):
    with opened(tmp_path / "new" / "run") as log:
        assert not (tmp_path / "new" / "run" / "metrics.jsonl").exists()
        for step in (1, 2, 5):
            log.log(step, {"loss": 1 / step, "lr": 3})
            assert read(tmp_path / "new" / "run")[-1] == {"step": step, "loss": 1 / step, "lr": 3.0}
    lines = (tmp_path / "new" / "run" / "metrics.jsonl").read_text().splitlines()
    assert lines[0] == '{"step": 1, "loss": 1.0, "lr": 3.0}' and len(lines) == 3


@settings(deadline=None)
@given(st.lists(st.floats(), min_size=1, max_size=8))
def test_numbers_come_back_as_they_were(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("run")
    with opened(folder) as log:
        log.log(3, {f"m{i}": value for i, value in enumerate(values)})
    (found,) = read(folder)
    assert found == {"step": 3} | {f"m{i}": x if math.isfinite(x) else None for i, x in enumerate(values)}
    assert [math.copysign(1, found[f"m{i}"]) for i, x in enumerate(values) if x == 0] == [
        math.copysign(1, x) for x in values if x == 0
    ]


def test_tensors_are_numbers_too(tmp_path):
    with opened(tmp_path) as log:
        log.log(1, {"a": torch.tensor(0.1), "b": torch.tensor(0.1, dtype=torch.float64), "c": torch.tensor(math.nan)})
    assert read(tmp_path) == [{"step": 1, "a": float(torch.tensor(0.1)), "b": 0.1, "c": None}]


def test_steps_must_grow(tmp_path):
    with opened(tmp_path) as log:
        with pytest.raises(ValueError, match="step 0 logged after step 0"):
            log.log(0, {"loss": 1.0})
        log.log(4, {"loss": 1.0})
        for step in (4, 3):
            with pytest.raises(ValueError, match=f"step {step} logged after step 4"):
                log.log(step, {"loss": 2.0})
        with pytest.raises(ValueError, match="key of the line itself"):
            log.log(5, {"step": 2.0})
        log.log(5, {"loss": 3.0})
    assert read(tmp_path) == [{"step": 4, "loss": 1.0}, {"step": 5, "loss": 3.0}]


# Resuming.


def test_a_resumed_log_forgets_later_steps_and_a_torn_line(tmp_path):
    with opened(tmp_path) as log:
        for step in range(1, 7):
            log.log(step, {"loss": step / 3})
    path = tmp_path / "metrics.jsonl"
    before = path.read_text().splitlines()
    with path.open("a") as file:
        file.write('{"step": 7, "lo')
    with opened(tmp_path) as log:
        log.truncate_after(4)
        assert path.read_text().splitlines() == before[:4]
        with pytest.raises(ValueError, match="step 4 logged after step 4"):
            log.log(4, {"loss": 0.0})
        log.log(5, {"loss": 9.0})
    assert read(tmp_path) == [*map(json.loads, before[:4]), {"step": 5, "loss": 9.0}]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_torn_line_goes_even_where_no_step_does(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.\xff\xfe')
    with opened(tmp_path) as log:
        log.truncate_after(2)
        log.log(3, {"loss": 0.25})
    assert read(tmp_path) == [{"step": 1, "loss": 0.5}, {"step": 3, "loss": 0.25}]


def test_truncating_in_mid_run_and_to_nothing(tmp_path):
    with opened(tmp_path) as log:
        log.truncate_after(0)  # no file yet
        log.log(1, {"loss": 1.0})
        log.log(2, {"loss": 2.0})
        log.truncate_after(1)
        log.log(2, {"loss": 3.0})
        assert read(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 3.0}]
        log.truncate_after(0)
        assert read(tmp_path) == []
        log.log(1, {"loss": 4.0})
    assert read(tmp_path) == [{"step": 1, "loss": 4.0}]


@pytest.mark.parametrize("bad", ["not JSON", "[1]", '{"loss": 1.0}', '{"step": "2"}', '{"step": 2', "", "7"])
def test_a_bad_line_in_the_middle_is_named(tmp_path, bad):
    content = f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n'
    (tmp_path / "metrics.jsonl").write_text(content)
    with opened(tmp_path) as log, pytest.raises(UserError, match="metrics.jsonl, line 2: expected") as caught:
        log.truncate_after(3)
    assert str(caught.value).endswith(f"found {bad!r}")
    assert (tmp_path / "metrics.jsonl").read_text() == content  # left for people to look at


def test_other_ranks_do_nothing(tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    folder = tmp_path / "run"
    with opened(folder, is_writer=False, tensorboard=True, wandb_project="p") as log:
        log.truncate_after(3)
        log.log(1, {"loss": 1.0})
        log.log(1, {"step": 1.0})
    log.close()
    assert not folder.exists() and capfd.readouterr() == ("", "")


# TensorBoard and W&B.


def scalars(folder) -> dict[str, dict[int, float]]:
    """As TensorBoard itself would show them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_the_run_and_forgets_what_a_resume_voids(tmp_path):
    with opened(tmp_path, tensorboard=True) as log:
        log.log(1, {"loss": 0.5, "kl": math.nan})
        for step in range(2, 6):
            log.log(step, {"loss": step / 4})
    found = scalars(tmp_path)
    assert found["loss"] == {1: 0.5, 2: 0.5, 3: 0.75, 4: 1.0, 5: 1.25}
    assert list(found["kl"]) == [1] and math.isnan(found["kl"][1])
    time.sleep(1.1)  # event files are ordered by the second in their name
    with opened(tmp_path, tensorboard=True) as log:
        log.truncate_after(3)
        log.log(4, {"loss": -1.0})
    assert scalars(tmp_path)["loss"] == {1: 0.5, 2: 0.5, 3: 0.75, 4: -1.0}


def test_without_tensorboard_there_is_none(tmp_path):
    with opened(tmp_path) as log:
        log.log(1, {"loss": 1.0})
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_what_is_asked_for_and_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="TensorBoard is on but not installed: pip install tensorboard"):
        opened(tmp_path, tensorboard=True)
    with pytest.raises(UserError, match="W&B project 'mine' is given but wandb is not installed: pip install wandb"):
        opened(tmp_path, wandb_project="mine")


def test_wandb_gets_the_numbers_under_one_id(tmp_path, monkeypatch):
    """Against a stand-in: what is sent, not what W&B does with it."""
    started, sent, ended = [], [], []
    run = types.SimpleNamespace(
        define_metric=lambda *given, **more: None, log=sent.append, finish=lambda: ended.append(True)
    )
    stand_in = types.SimpleNamespace(init=lambda **given: started.append(given) or run)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    for step in (1, 2):
        with opened(tmp_path / "mine", wandb_project="p") as log:
            log.truncate_after(step - 1)
            log.log(step, {"loss": step / 2})
        log.close()
    assert sent == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}] and ended == [True, True]
    assert started[0] == started[1] and started[0]["id"]
    assert (started[0]["project"], started[0]["name"]) == ("p", "mine")


# Progress.


def test_plain_lines_are_few_and_say_the_headline(tmp_path, capsys, clock):
    with opened(tmp_path, "cost", 100) as log:
        for step in range(1, 101):
            clock.now += 0.1
            log.log(step, {"lr": 9.0, "sign_accuracy": 0.25, "loss": 1.23456, "accuracy": step / 100})
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert [int(re.match(r"cost (\d+)/100 ", line)[1]) for line in lines] == [1, *range(10, 101, 10)]
    assert lines[0] == "cost 1/100  loss 1.235  accuracy 0.01  sign_accuracy 0.25  [00:00, 00:09 left]"
    assert lines[-1].endswith("accuracy 1  sign_accuracy 0.25  [00:10, 00:00 left]")


def test_slow_steps_are_shown_every_five_seconds(tmp_path, capsys, clock):
    with opened(tmp_path, "ppo-lag", 1000) as log:
        for step in range(1, 13):
            clock.now += 2
            log.log(step, {"lambda": 0.5, "kl": 2.0})
    lines = capsys.readouterr().err.splitlines()
    # At 2 s, then at the first step 5 s or more later; the last, not due, when the run ends early.
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [1, 4, 7, 10, 12]
    assert lines[1] == "ppo-lag 4/1000  lambda 0.5  kl 2  [00:08, 33:12 left]"


def test_a_resumed_run_counts_only_its_own_time(tmp_path, capsys, clock):
    with opened(tmp_path, "sft", 100) as log:
        clock.now += 60  # loading
        log.truncate_after(50)
        clock.now += 4
        log.log(51, {"loss": 1.0})
    assert capsys.readouterr().err == "sft 51/100  loss 1  [00:04, 03:16 left]\n"


def test_a_terminal_gets_a_bar(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with opened(tmp_path, "reward", 8) as log:
        log.truncate_after(5)
        log.log(6, {"loss": 0.5, "accuracy": 0.75, "lr": 1.0})
        log.log(8, {"loss": 0.25, "accuracy": 1.0})
    shown = terminal.getvalue().split("\r")
    assert any(frame.startswith("reward:") and "5/8" in frame for frame in shown)
    assert "8/8" in shown[-1] and "loss 0.25  accuracy 1" in shown[-1] and "lr" not in "".join(shown)
    assert shown[-1].endswith("\n")


# Phases and memory.


def test_phases_add_up_until_reported(clock):
    timer = PhaseTimer()
    for seconds, tokens in ((2.0, 300), (3.0, 200)):
        with timer.phase("train", tokens):
            clock.now += seconds
        clock.now += 100  # between phases
    with timer.phase("generate") as phase:
        clock.now += 4.0
        phase.tokens = 10
    with timer.phase("score"):
        clock.now += 0.5
    with timer.phase("instant", tokens=5):
        pass
    assert timer.report() == pytest.approx(
        {
            "seconds/train": 5.0,
            "tokens_per_second/train": 100.0,
            "seconds/generate": 4.0,
            "tokens_per_second/generate": 2.5,
            "seconds/score": 0.5,
            "seconds/instant": 0.0,
        }
    )
    assert timer.report() == {}
    with timer.phase("train", 6):
        clock.now += 2.0
    assert timer.report() == pytest.approx({"seconds/train": 2.0, "tokens_per_second/train": 3.0})


def test_a_phase_that_fails_is_counted_and_phases_nest(clock):
    timer = PhaseTimer()
    with pytest.raises(RuntimeError, match="broken"), timer.phase("outer"):
        clock.now += 1.0
        with timer.phase("inner", 8):
            clock.now += 2.0
        raise RuntimeError("broken")
    assert timer.report() == pytest.approx(
        {"seconds/outer": 3.0, "seconds/inner": 2.0, "tokens_per_second/inner": 4.0}
    )


def test_a_phase_takes_real_time():
    timer = PhaseTimer()
    before = time.perf_counter()
    with timer.phase("sleep"):
        time.sleep(0.05)
    assert 0.05 <= timer.report()["seconds/sleep"] <= time.perf_counter() - before


def test_peak_memory_grows_with_a_big_allocation_and_stays():
    if torch.cuda.is_initialized():
        pytest.skip("an earlier test uses CUDA: GPU memory is counted")

    def status(key: str) -> float:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(key)) / 2**20

    before = peak_memory_gib()
    # Past whatever earlier tests held at their peak.
    size = before - status("VmRSS") + 0.125
    block = torch.ones(int(size * 2**30), dtype=torch.uint8)
    held = status("VmRSS")
    after = peak_memory_gib()
    assert block[-1] == 1 and after - before > 0.1
    assert after == pytest.approx(held, rel=0.05)
    del block
    assert peak_memory_gib() >= after
