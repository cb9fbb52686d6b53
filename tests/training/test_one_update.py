"""Critics that train with the values of their own forward do as those that were scored before.

In every layout: the numbers of both orders, and those of one process.
"""

import json

import pytest
from metrics_close import assert_metrics_close

from megatron_safe.cli import parse, run_stage
from megatron_safe.config import ParallelConfig
from megatron_safe.runtime import start
from megatron_safe.training import experience

LAYOUTS = {"one": (1, 1, 1), "tp2": (2, 1, 1), "pp2": (1, 2, 1), "dp2": (1, 1, 2)}
COMMON = dict(
    max_tokens_per_micro_batch=30, max_tokens_per_score_micro_batch=50, kl_coeff=0.3, gamma=0.9, gae_lambda=0.8,
    missing_eos_penalty=0.7, score_clip=2.0, clip_value=0.05,
)  # fmt: skip
SEPARATE, SHARED = ("reward_critic", "cost_critic"), ("critic",)
CASES = {
    f"{len(critics)}-{reduction}-{whiten}-{warmup}": {
        "critics": critics,
        "ppo": COMMON
        | {"loss_reduction": reduction, "whiten_advantages": whiten, "critic_warmup_steps": warmup},
    }
    for critics, reduction, whiten, warmup in (
        (SEPARATE, "sequence", False, 0), (SEPARATE, "token", True, 1), (SEPARATE, "sequence", True, 0),
        (SHARED, "token", True, 0), (SHARED, "sequence", False, 1),
    )
}  # fmt: skip
"""critics, reduction, whitened, warm-up steps"""


@pytest.fixture(scope="module")
def orders(torchrun, tmp_path_factory):
    """layout -> for each case what both orders measured and how far their weights are apart; one start each."""
    found = {}

    def run(layout: str) -> dict[str, dict]:
        if layout not in found:
            tp, pp, dp = LAYOUTS[layout]
            plan = tmp_path_factory.mktemp(layout) / "plan.json"
            plan.write_text(json.dumps({"tp": tp, "pp": pp, "cases": list(CASES.values())}))
            torchrun(tp * pp * dp, "critic_orders.py", str(plan))
            found[layout] = dict(zip(CASES, json.loads(plan.with_suffix(".out.json").read_text()), strict=True))
        return found[layout]

    return run


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_orders_give_the_same_numbers_and_weights(orders, layout, case):
    found = orders(layout)[case]
    assert_metrics_close(found["at once"], found["apart"])
    assert found["weights"] < 5e-6  # of steps of 5e-3
    assert_metrics_close(found["at once"], orders("one")[case]["apart"])


def test_the_runs_are_worth_comparing(orders):
    for name, found in orders("one").items():
        first, second = found["apart"]
        warmup = CASES[name]["ppo"]["critic_warmup_steps"]
        assert ("actor_loss" in first) == (warmup == 0) and "actor_loss" in second
        for critic in CASES[name]["critics"]:
            assert first[f"{critic}_grad_norm"] > 0.1 and first[f"{critic}_skipped"] == 0
        for kind in ("reward", "cost"):
            assert abs(first[f"{kind}_critic_value_loss"] - second[f"{kind}_critic_value_loss"]) > 1e-3
        assert abs(first["reward_values_BT"] - first["cost_values_BT"]) > 1.0


@pytest.mark.parametrize("stage", ["ppo-lag", "ppo"])
def test_a_stage_takes_the_forward_less_by_itself(project, metrics_of, tmp_path, monkeypatch, stage):
    """And its metrics are those of a stage that scores its critics as if there were more updates."""

    def run(stage: str, out: str, *more: str) -> None:
        base = "ppo-lag" if stage == "ppo" else stage
        run_stage(stage, parse(stage, project.arguments(base, tmp_path / out, "one", *more, models=tmp_path)), runtime)

    read = []
    values = experience.read_values
    monkeypatch.setattr(experience, "read_values", lambda *arguments: read.append(1) or values(*arguments))
    with start(ParallelConfig(), 0) as runtime:
        for model in ("sft", "reward", "cost"):
            run(model, model, "--training.steps=1")
        run(stage, "at-once", "--ppo.mini_batch_size=16")
        assert read == []
        monkeypatch.setattr(experience, "single_update", lambda config: False)
        run(stage, "apart", "--ppo.mini_batch_size=16")
        assert len(read) == 2
    assert_metrics_close(metrics_of(tmp_path / "at-once"), metrics_of(tmp_path / "apart"))
