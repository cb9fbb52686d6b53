"""Supervised fine-tuning: the start of the actor (paper, section 3, before stage 1)."""

import torch

from megatron_safe.config import SftConfig
from megatron_safe.data.batches import TokenBatch
from megatron_safe.data.datasets import DemonstrationDataset
from megatron_safe.data.sampler import ShuffledStream, shard
from megatron_safe.data.sources import read_demonstrations
from megatron_safe.data.tokenizer import load_tokenizer
from megatron_safe.models.heads import token_log_probs
from megatron_safe.models.pipeline import forward_backward
from megatron_safe.models.roles import Role
from megatron_safe.runtime import Runtime
from megatron_safe.training import checkpoint
from megatron_safe.training.metrics import PhaseTimer, peak_memory_gib
from megatron_safe.training.run import Run, check_batch
from megatron_safe.training.setup import make_role

STATISTICS = ("loss", "tokens")


def demonstration_batch(batch: TokenBatch, runtime: Runtime) -> tuple[dict[str, torch.Tensor], float]:
    """What the actor reads of demonstrations, and the response tokens in the global batch."""
    batch = batch.to(runtime.device)
    mask_BT = batch.response_mask_BT
    tokens = runtime.sum_over_data_parallel({"tokens": float(mask_BT.sum())})["tokens"]
    return {"tokens": batch.tokens_BL[:, :-1], "targets": batch.tokens_BL[:, 1:], "mask": mask_BT}, tokens


def demonstration_loss(actor: Role, weight: float, global_tokens: float):
    """`weight` x the mean negative log-likelihood of response tokens over the global batch."""

    def loss(hidden_TBh, part):
        log_probs_BT = token_log_probs(actor.module, hidden_TBh, part["targets"])
        mask_BT = part["mask"]
        mean = -(log_probs_BT * mask_BT).sum() / global_tokens
        return weight * mean, {"loss": mean, "tokens": mask_BT.sum()}

    return loss


def run(config: SftConfig, runtime: Runtime) -> None:
    """Train the actor; OUT/checkpoints holds it under the role name `actor`."""
    check_batch(config.batch.global_batch_size, config.batch.micro_batch_size, runtime, "batch")
    tokenizer = load_tokenizer(config.tokenizer.path, config.tokenizer.template)
    records = read_demonstrations(config.data.train)
    data = DemonstrationDataset(records, tokenizer, config.tokenizer.template, config.batch.max_length)
    steps = config.training.steps
    with Run(config, "sft", steps, runtime) as folder:
        actor = make_role(
            "actor", config.model, config.batch.precision, config.run.seed, tokenizer, runtime, folder.resume,
            config.optimizer, steps, config.batch.max_length, "model",
        )  # fmt: skip
        if folder.resume:
            checkpoint.load_training([actor], folder.resume)
        runtime.print(data.report())
        stream = ShuffledStream(len(data), config.batch.global_batch_size, config.run.seed)
        timer = PhaseTimer()
        for step in range(folder.first_step, steps):
            with timer.phase("train") as phase:
                rows = shard(stream.indices(step), runtime.dp_rank, runtime.dp_size)
                batch, global_tokens = demonstration_batch(data.batch(rows), runtime)
                actor.zero_grad()
                loss = demonstration_loss(actor, 1.0, global_tokens)
                values = forward_backward(actor, batch, loss, STATISTICS, config.batch.micro_batch_size)
                values |= actor.step()
                phase.tokens = batch["tokens"].numel()
            values |= timer.report() | {"peak_memory_gib": peak_memory_gib()}
            if folder.finish_step(step + 1, values, [actor], {}):
                break
