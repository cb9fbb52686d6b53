"""Started by torchrun: PPO-Lag's updates on made-up rollouts, the critics trained after they were scored and at once.

usage: critic_orders.py PLAN.json

The plan: {"tp": 1, "pp": 1, "cases": [{"critics": [names], "ppo": settings of PpoTrainingConfig}, ...]}. To
PLAN.out.json go, for each case, what each order measured in each of two rollout batches, and how far their weights are
apart in the end.
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch

from megatron_safe.config import ModelConfig, OptimizerConfig, ParallelConfig, PpoConfig, PpoTrainingConfig
from megatron_safe.data.batches import collate
from megatron_safe.models.roles import Role
from megatron_safe.rollout.generate import Trajectories
from megatron_safe.runtime import start
from megatron_safe.training.experience import critics_of, read_values, score
from megatron_safe.training.ppo_lag import train

VOCABULARY, PAD, ROWS, BATCHES = 21, 3, 8, 2
MODEL = ModelConfig(
    num_layers=2, hidden_size=32, ffn_hidden_size=40, num_attention_heads=4, num_query_groups=2,
    max_sequence_length=64, vocab_multiple=8, init_std=0.3,
)  # fmt: skip
OPTIMIZER = OptimizerConfig(lr=5e-3, eps=1e-5, schedule="constant")  # a smaller eps blows rounding up in Adam's first
LAMBDA = 0.75


def roll_out(runtime, seed: int) -> Trajectories:
    """This rank's rows of a global batch: answers of 1 to 9 tokens, some cut off."""
    draw = torch.Generator().manual_seed(seed)
    prompts = torch.randint(1, 8, (ROWS,), generator=draw).tolist()
    answers = torch.randint(1, 10, (ROWS,), generator=draw).tolist()
    rows = [
        (torch.randint(VOCABULARY, (n + m,), generator=draw).tolist(), n)
        for n, m in zip(prompts, answers, strict=True)
    ]
    batch = collate(rows, PAD)
    noise_BT = -0.1 - 3 * torch.rand(batch.response_mask_BT.shape, generator=draw)
    log_probs_BT = torch.where(batch.response_mask_BT, noise_BT, 0.0)
    ended_B = torch.rand(ROWS, generator=draw) < 0.7
    mine = slice(runtime.dp_rank, None, runtime.dp_size)
    return Trajectories(batch.select(mine), log_probs_BT[mine], ended_B[mine])


def run(config: PpoConfig, names: list[str], at_once: bool, runtime) -> tuple[list[dict], list[torch.Tensor]]:
    """What the updates on the rollout batches measured, and this rank's weights after them."""
    ppo = config.ppo
    learners = ["actor", *names]
    roles = {
        name: Role(name, MODEL, runtime, VOCABULARY, "fp32", seed, OPTIMIZER if name in learners else None, BATCHES)
        for seed, name in enumerate([*learners, "reference", "reward_model", "cost_model"])
    }
    steps = []
    for step in range(BATCHES):
        trajectories = roll_out(runtime, step)
        scores = score(roles, trajectories, ppo, 0.8)
        assert scores.values_2BT is None
        if not at_once:
            values_2BT = read_values(critics_of(roles), trajectories, ppo.max_tokens_per_score_micro_batch)
            scores = dataclasses.replace(scores, values_2BT=values_2BT)
        experience, measured = train(config, roles, scores, torch.tensor(LAMBDA).double(), None, step, runtime)
        sums = {name: float(getattr(experience, name).sum()) for name in ("reward_values_BT", "cost_values_BT")}
        steps.append(measured | runtime.sum_over_data_parallel(sums))
    return steps, [parameter.detach() for name in learners for parameter in roles[name].module.parameters()]


def main(path: Path) -> None:
    plan = json.loads(path.read_text())
    found = []
    with start(ParallelConfig(plan["tp"], plan["pp"], timeout_seconds=120.0), 0) as runtime:
        for case in plan["cases"]:
            ppo = PpoTrainingConfig(rollout_batch_size=ROWS, mini_batch_size=ROWS, **case["ppo"])
            apart, weights = run(PpoConfig(ppo=ppo), case["critics"], False, runtime)
            at_once, others = run(PpoConfig(ppo=ppo), case["critics"], True, runtime)
            apart_by = max(float((one - other).abs().max()) for one, other in zip(weights, others, strict=True))
            on_all = runtime.gather_over_data_parallel(torch.tensor([apart_by], device=runtime.device))
            found.append({"apart": apart, "at once": at_once, "weights": float(on_all.max())})
        if runtime.is_main:
            path.with_suffix(".out.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
