"""The same numbers and the same text in every layout, through the stages as a user runs them."""

import json
import math

import pytest
from metrics_close import ABSOLUTE, assert_metrics_close

ELSEWHERE = ["tp2", "pp2", "dp2", "tp2pp2"]
EXPECTED = {
    "sft": {"loss", "tokens", "grad_norm", "lr", "skipped"},
    "reward": {"loss", "accuracy", "score", "grad_norm", "lr", "skipped"},
    "cost": {"loss", "accuracy", "sign_accuracy", "score", "grad_norm", "lr", "skipped"},
    "ppo-lag": {
        "actor_loss", "ptx_loss", "entropy", "clip_fraction", "approximate_kl", "actor_grad_norm", "actor_lr",
        "actor_skipped", "reward_critic_value_loss", "reward_critic_grad_norm", "reward_critic_skipped",
        "cost_critic_value_loss", "cost_critic_grad_norm", "cost_critic_skipped", "reward", "cost", "kl", "length",
        "ended", "red_team_cost", "lambda", "threshold", "j_c", "rollout_kl",
    },
}  # fmt: skip
STEPS = {"sft": 4, "reward": 4, "cost": 4, "ppo-lag": 2, "ppo-lag-token": 1}


@pytest.mark.parametrize("run", STEPS)
@pytest.mark.parametrize("layout", ELSEWHERE)
def test_metrics_equal_those_of_one_process(finished, metrics_of, layout, run):
    assert_metrics_close(metrics_of(finished(layout) / run), metrics_of(finished("one") / run))


@pytest.mark.parametrize("layout", ELSEWHERE)
@pytest.mark.parametrize("which", ["reward", "cost"])
def test_held_out_accuracies_equal_those_of_one_process(finished, layout, which):
    found, wanted = (json.loads((finished(name) / which / "eval.json").read_text()) for name in (layout, "one"))
    assert_metrics_close([{"step": 0, **found}], [{"step": 0, **wanted}])


@pytest.mark.parametrize("layout", ELSEWHERE)
def test_sampled_text_is_that_of_one_process(finished, layout):
    found, wanted = ((finished(name) / "generate" / "answers.jsonl").read_text() for name in (layout, "one"))
    assert found == wanted


def test_the_reference_run_is_worth_comparing_with(finished, metrics_of):
    """One process: all metrics are there, the models move, some answers end and some do not, λ moves."""
    folder = finished("one")
    for run, steps in STEPS.items():
        found = metrics_of(folder / run)
        assert [line["step"] for line in found] == list(range(1, steps + 1))
        for line in found:
            assert set(line) == EXPECTED[run.removesuffix("-token")] | {"step"}
            assert all(math.isfinite(value) for value in line.values()), line
    first, last = metrics_of(folder / "ppo-lag")
    assert first["lambda"] != last["lambda"]
    assert 0 < first["ended"] < 1
    assert abs(last["kl"]) > 100 * ABSOLUTE
    assert first["actor_grad_norm"] > 1.0  # so clipping at 1.0 took part
    answers = [json.loads(line) for line in (folder / "generate" / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 42 and len({answer["response"] for answer in answers}) > 30
    assert {answer["ended"] for answer in answers} == {True, False}


@pytest.mark.parametrize("layout", ["tp2", "dp2"])
def test_distributed_optimizer_trains_as_the_plain_one(finished, metrics_of, layout):
    assert_metrics_close(metrics_of(finished(layout) / "distributed"), metrics_of(finished("one") / "sft"))


def test_bf16_is_near_fp32(finished, metrics_of):
    """8 bits of mantissa: a percent or two in loss, more in what is clipped and stepped."""
    wanted = metrics_of(finished("one") / "sft")
    found = metrics_of(finished("one") / "bf16")
    for one, other in zip(found, wanted, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.03)
        assert one["loss"] != other["loss"]
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.1)
