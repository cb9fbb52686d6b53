"""Training of the reward model and of the cost model on comparisons (paper, section 3.2).

Legend: P pairs, rows come as (first, second) of pair 0, of pair 1, ...; S tokens.
"""

from collections.abc import Callable
from typing import Literal

import torch

from megatron_safe.algorithms.preference import cost_loss_B, reward_loss_B
from megatron_safe.config import PreferenceConfig
from megatron_safe.data.datasets import ComparisonBatch, ComparisonDataset
from megatron_safe.data.sampler import ShuffledStream, shard
from megatron_safe.data.sources import read_comparisons
from megatron_safe.data.tokenizer import load_tokenizer
from megatron_safe.models.heads import last_token_scores
from megatron_safe.models.pipeline import forward, forward_backward
from megatron_safe.models.roles import Role
from megatron_safe.runtime import Runtime
from megatron_safe.training import checkpoint
from megatron_safe.training.metrics import PhaseTimer, peak_memory_gib
from megatron_safe.training.run import Run, check_batch
from megatron_safe.training.setup import make_role

Which = Literal["reward", "cost"]
STATISTICS = {
    "reward": ("loss", "accuracy", "score"),
    "cost": ("loss", "accuracy", "sign_accuracy", "score"),
}


def pair_batch(batch: ComparisonBatch, runtime: Runtime) -> dict[str, torch.Tensor]:
    """What a scoring model reads of pairs: [2P, S], the two answers of a pair next to each other, so that any even
    micro-batch holds whole pairs."""
    batch = batch.to(runtime.device)

    def woven(first, second):
        return torch.stack([first, second], dim=1).flatten(0, 1)

    return {
        "tokens": woven(batch.first.tokens_BL, batch.second.tokens_BL),
        "lengths": woven(batch.first.lengths_B, batch.second.lengths_B),
        "signs": woven(batch.first_sign_B, batch.second_sign_B),
        "like": woven(batch.first.lengths_B, batch.second.lengths_B),
    }


def measure(
    which: Which, scores_2P: torch.Tensor, signs_2P: torch.Tensor, global_pairs: int
) -> dict[str, torch.Tensor]:
    """Means over the global batch: `accuracy` of the ranking, `score`, and for costs `sign_accuracy` of s C < 0."""
    first_P, second_P = scores_2P.view(-1, 2).unbind(dim=1)
    measured = {
        "accuracy": (first_P > second_P).sum() / global_pairs,
        "score": scores_2P.sum() / (2 * global_pairs),
    }
    if which == "cost":
        measured["sign_accuracy"] = (scores_2P * signs_2P < 0).sum() / (2 * global_pairs)
    return measured


def pair_loss(which: Which, score_l2: float, global_pairs: int) -> Callable:
    """The mean over the global batch of the reward loss or the cost loss of each pair."""

    def loss(scores_BS, part):
        scores_2P = last_token_scores(scores_BS, part["lengths"])
        first_P, second_P = scores_2P.view(-1, 2).unbind(dim=1)
        if which == "reward":
            loss_P = reward_loss_B(first_P, second_P, score_l2)
        else:
            first_sign_P, second_sign_P = part["signs"].view(-1, 2).unbind(dim=1)
            loss_P = cost_loss_B(first_P, second_P, first_sign_P, second_sign_P, score_l2)
        mean = loss_P.sum() / global_pairs
        return mean, {"loss": mean} | measure(which, scores_2P.detach(), part["signs"], global_pairs)

    return loss


def evaluate(which: Which, role: Role, data: ComparisonDataset, pairs_at_a_time: int) -> dict[str, float]:
    """Accuracies over a held-out set; the same on every rank. Pairs are dealt out over the data-parallel ranks.

    `safe_score` and `unsafe_score` are the mean scores of answers labelled safe and unsafe: a limit on cost
    (`lagrange.threshold`) is in these units, and one near `safe_score` asks for answers as safe as the labelled ones.
    """
    runtime = role.runtime
    sums = {name: 0.0 for name in (*STATISTICS[which][1:], "safe", "unsafe", "safe_score", "unsafe_score")}
    mine = range(runtime.dp_rank, len(data), runtime.dp_size)
    for start in range(0, len(mine), pairs_at_a_time):
        batch = pair_batch(data.batch(list(mine[start : start + pairs_at_a_time])), runtime)
        scores_2P = forward(
            role, batch, lambda scores, part: last_token_scores(scores, part["lengths"]), 2 * pairs_at_a_time
        )
        for name, value in measure(which, scores_2P, batch["signs"], len(data)).items():
            sums[name] += float(value)
        for name, chosen in (("safe", batch["signs"] > 0), ("unsafe", batch["signs"] < 0)):
            sums[name] += float(chosen.sum())
            sums[f"{name}_score"] += float((scores_2P * chosen).sum())
    sums = runtime.sum_over_data_parallel(sums)
    for name in ("safe", "unsafe"):
        sums[f"{name}_score"] /= max(1.0, sums.pop(name))
    return sums


def run(config: PreferenceConfig, runtime: Runtime, which: Which) -> None:
    """Train the reward model or the cost model; OUT/checkpoints holds it under the role name `reward_model` or
    `cost_model`, OUT/eval.json the accuracies on data.eval."""
    check_batch(config.batch.global_batch_size, config.batch.micro_batch_size, runtime, "batch")
    tokenizer = load_tokenizer(config.tokenizer.path, config.tokenizer.template)

    def dataset(paths):
        records = read_comparisons(paths)
        return ComparisonDataset(records, tokenizer, config.tokenizer.template, config.batch.max_length, which)

    data = dataset(config.data.train)
    held_out = dataset(config.data.eval) if config.data.eval else None
    steps, pairs = config.training.steps, config.batch.global_batch_size
    with Run(config, which, steps, runtime) as folder:
        role = make_role(
            f"{which}_model", config.model, config.batch.precision, config.run.seed, tokenizer, runtime, folder.resume,
            config.optimizer, steps, config.batch.max_length, "model",
        )  # fmt: skip
        if folder.resume:
            checkpoint.load_training([role], folder.resume)
        runtime.print(data.report())
        stream = ShuffledStream(len(data), pairs, config.run.seed)
        timer = PhaseTimer()
        loss = pair_loss(which, config.training.score_l2, pairs)
        for step in range(folder.first_step, steps):
            with timer.phase("train") as phase:
                batch = pair_batch(data.batch(shard(stream.indices(step), runtime.dp_rank, runtime.dp_size)), runtime)
                role.zero_grad()
                values = forward_backward(role, batch, loss, STATISTICS[which], 2 * config.batch.micro_batch_size)
                values |= role.step()
                phase.tokens = batch["tokens"].numel()
            values |= timer.report() | {"peak_memory_gib": peak_memory_gib()}
            if folder.finish_step(step + 1, values, [role], {}):
                break
        if held_out is not None:
            folder.write_json("eval.json", evaluate(which, role, held_out, config.batch.micro_batch_size))
