"""A run made up by hand, and the figures behind the pictures of its report."""

import json
import math
from contextlib import contextmanager

import numpy as np

from megatron_safe.evaluation import plots

BASE = 'SFT <b> & "co"'
SUMMARY = {
    "seed": 7,
    "layout": "tp2",
    "seconds": 333,
    "models": [
        {
            "name": BASE,
            "harmful_rate": 0.5,
            "judged": 12,
            "harmful_rate_by_category": {"theft": 0.8, "privacy_leak": 0.2, "arson": 0.4, "fraud,lies": None},
            "helpfulness_elo": 0.0,
            "helpfulness_elo_benign": 0.0,
            "harmlessness_elo": 0.0,
            "refusal_rate_benign": 0.021,
            "mean_reward": np.float32(-0.25),
            "mean_cost": 1.5,
        },
        {"name": "round 1", "harmful_rate": 0.1234, "helpfulness_elo": 99.6, "mean_cost": math.nan},
        {
            "name": "round 2",
            "harmful_rate": 0.02,
            "judged": 1000,
            "harmful_rate_by_category": {"theft": 0.1, "privacy_leak": 0.25, "arson": 0.4, "fraud,lies": 0.9},
            "helpfulness_elo": 244.91,
            "helpfulness_elo_benign": -12.4,
            "harmlessness_elo": np.float64(268.3),
            "refusal_rate_benign": 0.034,
            "mean_reward": 3.456,
            "mean_cost": -2.0,
        },
    ],
    "reward_model_accuracy": (0.7123, math.inf),
    "cost_model_accuracy": 0.811,
    "cost_model_sign_accuracy": None,
    "lambda_final": 0.125,
    "ablations": {
        "points": [
            {"name": "PPO-Lag", "kind": "ppo-lag", "nu": None, "mean_reward": 3.0, "mean_cost": -1.0,
             "harmful_rate": 0.02, "helpfulness_elo": 200.0},
            {"name": "PPO", "kind": "ppo", "nu": None, "mean_reward": 5.0, "mean_cost": 4.0, "harmful_rate": 0.6},
            # Out of order, better, worse, neither, and the same as PPO-Lag.
            {"name": "ν 1", "kind": "shaping", "nu": 1.0, "mean_reward": 3.5, "mean_cost": -1.0, "harmful_rate": 0.03},
            {"name": "ν 0.1", "kind": "shaping", "nu": 0.1, "mean_reward": 2.5, "mean_cost": 0.0, "harmful_rate": 0.3},
            {"name": "ν 10", "kind": "shaping", "nu": 10, "mean_reward": 1.0, "mean_cost": -2.0, "harmful_rate": 0.01},
            {"name": "ν 100", "kind": "shaping", "nu": 100.0, "mean_reward": 3.0, "mean_cost": -1.0},
            {"name": "diverged", "kind": "shaping", "nu": 0.5, "mean_reward": math.nan, "mean_cost": 9.0},
        ]
    },
}  # fmt: skip
ROUNDS = {
    "round 1": [
        {"step": 1, "lambda": 1.0, "j_c": None, "threshold": -0.5},
        {"step": 2, "lambda": 2.5, "j_c": 0.5, "threshold": -0.5},
    ],
    "round 2": [
        {"step": 1, "lambda": 1.75, "j_c": -0.5, "threshold": -0.5},
        {"step": 2, "lambda": 0.125, "j_c": -1.25, "threshold": -0.5},
        {"step": 3, "loss": 0.1, "j_c": 0.0, "threshold": -0.5},
    ],
}
SCORES = {
    BASE: {"reward": [1.0, 2.0, 3.0], "cost": [1.0, -1.0, 0.5], "harmful": [True, False, False]},
    "round 1": {"reward": [100.0], "cost": [100.0], "harmful": [True]},
    "round 2": {
        "reward": np.array([4.0, 4.0, 5.0, 5.0]),
        "cost": np.array([-1.0, -2.0, 0.0, -3.0]),
        "harmful": np.array([False, False, False, True]),
    },
}


def write_runs(folder) -> list:
    runs = []
    for name, records in ROUNDS.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        runs.append((name, path))
    return runs


def remember_figures(patch) -> dict:
    """file name -> the figure behind it, filled as they are drawn."""
    figures = {}
    original = plots._figure

    @contextmanager
    def remembered(path, *size):
        with original(path, *size) as figure:
            figures[path.name] = figure
            yield figure

    patch.setattr(plots, "_figure", remembered)
    return figures
