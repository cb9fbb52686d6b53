"""Training of the reward model and of the cost model on comparisons (paper, section 3.2).

Legend: P pairs, rows come as (first, second) of pair 0, of pair 1, ...; n answers of a pack.
"""

from collections.abc import Callable
from typing import Literal

import torch

from megatron_safe.algorithms.preference import cost_loss_B, reward_loss_B
from megatron_safe.config import PreferenceConfig
from megatron_safe.data.datasets import ComparisonBatch, ComparisonDataset
from megatron_safe.data.mixture import Mixture, read
from megatron_safe.data.sampler import shard_by_length
from megatron_safe.data.tokenizer import load_tokenizer
from megatron_safe.models.packing import Sequences
from megatron_safe.models.pipeline import forward, forward_backward
from megatron_safe.models.roles import Role
from megatron_safe.runtime import Runtime
from megatron_safe.training import checkpoint
from megatron_safe.training.metrics import PhaseTimer, peak_memory_gib
from megatron_safe.training.run import Run, check_batch
from megatron_safe.training.setup import make_role

Which = Literal["reward", "cost"]
LABELS = {"reward": "better_response_id", "cost": "safer_response_id"}
STATISTICS = {
    "reward": ("loss", "accuracy", "score"),
    "cost": ("loss", "accuracy", "signs_right", "signs", "score"),
}


def woven(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """[P, ...] twice -> [2P, ...], the two answers of a pair next to each other."""
    return torch.stack([first, second], dim=1).flatten(0, 1)


def pair_sequences(batch: ComparisonBatch) -> tuple[Sequences, torch.Tensor]:
    """What a scoring model reads of pairs, and the signs of the 2P answers."""
    answers = Sequences.to_last(
        woven(batch.first.tokens_BL, batch.second.tokens_BL), woven(batch.first.lengths_B, batch.second.lengths_B)
    )
    return answers, woven(batch.first_sign_B, batch.second_sign_B)


def measure(
    which: Which, scores_2P: torch.Tensor, signs_2P: torch.Tensor, global_pairs: int
) -> dict[str, torch.Tensor]:
    """Means over the global batch: `accuracy` of the ranking, `score`. For costs also what `sign_accuracy` is made of:
    `signs`, how many answers are labelled safe or unsafe, and `signs_right`, how many of them have s C < 0."""
    first_P, second_P = scores_2P.view(-1, 2).unbind(dim=1)
    measured = {
        "accuracy": (first_P > second_P).sum() / global_pairs,
        "score": scores_2P.sum() / (2 * global_pairs),
    }
    if which == "cost":
        measured["signs_right"] = (scores_2P * signs_2P < 0).sum().float()
        measured["signs"] = (signs_2P != 0).sum().float()
    return measured


def with_sign_accuracy(values: dict[str, float]) -> dict[str, float]:
    """The values, with `sign_accuracy` in place of its two counts; without it where no answer is labelled."""
    counts = {"signs_right", "signs"}
    found = {"sign_accuracy": values["signs_right"] / values["signs"]} if values.get("signs") else {}
    return {name: value for name, value in values.items() if name not in counts} | found


def pair_loss(which: Which, score_l2: float, global_pairs: int) -> Callable:
    """The mean over the global batch of the reward loss or the cost loss of each pair."""

    def loss(scores_2P, part):
        scores_2P = scores_2P.float()
        first_P, second_P = scores_2P.view(-1, 2).unbind(dim=1)
        if which == "reward":
            loss_P = reward_loss_B(first_P, second_P, score_l2)
        else:
            first_sign_P, second_sign_P = part["signs"].view(-1, 2).unbind(dim=1)
            loss_P = cost_loss_B(first_P, second_P, first_sign_P, second_sign_P, score_l2)
        mean = loss_P.sum() / global_pairs
        return mean, {"loss": mean} | measure(which, scores_2P.detach(), part["signs"], global_pairs)

    return loss


def evaluate(
    which: Which, role: Role, data: ComparisonDataset, pairs_at_a_time: int, max_tokens: int
) -> dict[str, float]:
    """Accuracies over a held-out set; the same on every rank. Pairs are dealt out over the data-parallel ranks.
    `sign_accuracy` is of the answers that are labelled safe or unsafe.

    `safe_score` and `unsafe_score` are the mean scores of answers labelled safe and unsafe: a limit on cost
    (`lagrange.threshold`) is in these units, and one near `safe_score` asks for answers as safe as the labelled ones.
    """
    runtime = role.runtime
    sums = {name: 0.0 for name in (*STATISTICS[which][1:], "safe", "unsafe", "safe_score", "unsafe_score")}
    mine = range(runtime.dp_rank, len(data), runtime.dp_size)
    for start in range(0, len(mine), pairs_at_a_time):
        batch = data.batch(list(mine[start : start + pairs_at_a_time])).to(runtime.device)
        answers, signs_2P = pair_sequences(batch)
        scores_2P = forward(role, answers, max_tokens, lambda scores_n, _: scores_n)
        for name, value in measure(which, scores_2P, signs_2P, len(data)).items():
            sums[name] += float(value)
        for name, chosen in (("safe", signs_2P > 0), ("unsafe", signs_2P < 0)):
            sums[name] += float(chosen.sum())
            sums[f"{name}_score"] += float((scores_2P * chosen).sum())
    sums = runtime.sum_over_data_parallel(sums)
    for name in ("safe", "unsafe"):
        sums[f"{name}_score"] /= max(1.0, sums.pop(name))
    return with_sign_accuracy(sums)


def run(config: PreferenceConfig, runtime: Runtime, which: Which) -> None:
    """Train the reward model or the cost model; OUT/checkpoints holds it under the role name `reward_model` or
    `cost_model`, OUT/eval.json the accuracies on data.eval."""
    check_batch(config.batch.global_batch_size, runtime, "batch.global_batch_size")
    tokenizer = load_tokenizer(config.tokenizer.path, config.tokenizer.template)

    def mix(name: str, weighted: bool) -> Mixture:
        values, on_bad_row = getattr(config.data, name), config.data.on_bad_row
        return read("comparisons", f"data.{name}", values, on_bad_row, LABELS[which], weighted, runtime.print)

    def dataset(mixture: Mixture) -> ComparisonDataset:
        return ComparisonDataset(
            mixture.records, tokenizer, config.tokenizer.template, config.batch.max_length, which
        )

    mixture = mix("train", weighted=True)
    data = dataset(mixture)
    held_out = dataset(mix("eval", weighted=False)) if config.data.eval else None
    steps, pairs = config.training.steps, config.batch.global_batch_size
    with Run(config, which, steps, runtime) as folder:
        role = make_role(
            f"{which}_model", config.model, config.batch.precision, config.run.seed, tokenizer, runtime, folder.resume,
            config.optimizer, steps, config.batch.max_length, "model",
        )  # fmt: skip
        if folder.resume:
            checkpoint.load_training([role], folder.resume)
        runtime.print(data.report())
        stream = mixture.stream(data.records, pairs, config.run.seed)
        timer = PhaseTimer()
        loss = pair_loss(which, config.training.score_l2, pairs)
        for step in range(folder.first_step, steps):
            with timer.phase("train") as phase:
                rows = stream.indices(step)
                rows = shard_by_length(rows, data.lengths(rows), runtime.dp_rank, runtime.dp_size)
                batch = data.batch(rows).to(runtime.device)
                answers, signs_2P = pair_sequences(batch)
                role.zero_grad()
                values = forward_backward(
                    role, answers, config.batch.max_tokens_per_micro_batch, loss, STATISTICS[which],
                    {"signs": signs_2P}, together=2,
                )  # fmt: skip
                values = with_sign_accuracy(values) | role.step()
                phase.tokens = int(answers.lengths_B.sum())
            values |= timer.report() | {"peak_memory_gib": peak_memory_gib()}
            if folder.finish_step(step + 1, values, [role], {}):
                break
        if held_out is not None:
            max_tokens = config.batch.max_tokens_per_micro_batch
            folder.write_json("eval.json", evaluate(which, role, held_out, pairs, max_tokens))
