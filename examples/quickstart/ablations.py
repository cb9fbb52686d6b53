"""What PPO on reward alone and fixed shaping make of SFT with round 1's models, beside PPO-Lag in round 1.

Round 1's and not the last: the later reward models were taught with pairs from policies that were safe already, and
have learnt some of the safety that is to be tested.
"""

from pathlib import Path

from megatron_safe.rounds import Loop

SHAPING_COEFFS = (0.01, 0.5, 1.0, 2.0, 5.0, 10.0, 100.0)


def ablate(loop: Loop) -> dict[str, list[dict]]:
    """Train and judge the baselines in OUT/ablations; the report's `ablations`."""
    config = loop.config
    sft, first = loop.policies["SFT"], loop.policies["round 1"]
    models = {which: loop.out / "round1" / which for which in ("reward", "cost")}
    kinds: dict[str, tuple[str, float | None]] = {"PPO (reward only)": ("ppo", None)}
    kinds |= {f"shaping ν = {nu:g}": ("shaping", nu) for nu in SHAPING_COEFFS}
    policies: dict[str, Path] = {"SFT": sft, "PPO-Lag": first}
    inputs = loop.ppo_inputs(1, config.rounds[0], sft, models)
    for name, (_, nu) in kinds.items():
        stage, folder = ("ppo", "ablations/ppo") if nu is None else ("ppo-reward-shaping", f"ablations/nu-{nu:g}")
        shaping = {} if nu is None else {"ppo": {"shaping_coeff": nu}}
        policies[name] = loop.stage(stage, folder, folder, config.ppo, config.rounds[0].ppo, inputs, shaping)
    kinds = {"PPO-Lag": ("ppo-lag", None)} | kinds
    summary = loop.judge(policies, models, loop.out / "ablations" / "evaluate")
    judged = {model["name"]: model for model in summary["models"]}
    return {"points": [{**judged[name], "kind": kind, "nu": nu} for name, (kind, nu) in kinds.items()]}
