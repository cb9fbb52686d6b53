"""Supervised fine-tuning: the start of the actor (paper, section 3, before stage 1).

Legend: n learnt tokens of a pack, h hidden size.
"""

from megatron_safe.config import SftConfig
from megatron_safe.data.batches import TokenBatch
from megatron_safe.data.datasets import DemonstrationDataset
from megatron_safe.data.mixture import read
from megatron_safe.data.sampler import shard_by_length
from megatron_safe.data.tokenizer import load_tokenizer
from megatron_safe.models.heads import token_log_probs
from megatron_safe.models.packing import Sequences
from megatron_safe.models.pipeline import forward_backward
from megatron_safe.models.roles import Role
from megatron_safe.runtime import Runtime
from megatron_safe.training import checkpoint
from megatron_safe.training.metrics import PhaseTimer, peak_memory_gib
from megatron_safe.training.run import Run, check_batch
from megatron_safe.training.setup import make_role


def demonstration_gradient(actor: Role, batch: TokenBatch, max_tokens: int, weight: float = 1.0) -> dict[str, float]:
    """Add the gradient of `weight` x the mean negative log-likelihood of learnt tokens over the global batch: those of
    the responses, and of the assistant's earlier turns where the batch asks for them.

    Returns:
        `loss`, that mean, and `tokens`, how many learnt tokens the global batch has.
    """
    batch = batch.to(actor.runtime.device)
    mask_BT = batch.learnt_mask_BT
    global_tokens = actor.runtime.sum_over_data_parallel({"tokens": float(mask_BT.sum())})["tokens"]

    def loss(hidden_nh, part):
        log_probs_n = token_log_probs(actor.module, hidden_nh, part["targets"])
        mean = -log_probs_n.sum() / global_tokens
        return weight * mean, {"loss": mean}

    learnt = Sequences.to_predict(batch.tokens_BL, batch.lengths_B, mask_BT)
    inputs = {"targets": batch.tokens_BL[:, 1:][mask_BT]}
    return forward_backward(actor, learnt, max_tokens, loss, ("loss",), inputs) | {"tokens": global_tokens}


def run(config: SftConfig, runtime: Runtime) -> None:
    """Train the actor; OUT/checkpoints holds it under the role name `actor`."""
    check_batch(config.batch.global_batch_size, runtime, "batch.global_batch_size")
    tokenizer = load_tokenizer(config.tokenizer.path, config.tokenizer.template)
    mixture = read("demonstrations", "data.train", config.data.train, config.data.on_bad_row, say=runtime.print)
    data = DemonstrationDataset(
        mixture.records, tokenizer, config.tokenizer.template, config.batch.max_length, config.training.loss_turns
    )
    steps = config.training.steps
    with Run(config, "sft", steps, runtime) as folder:
        actor = make_role(
            "actor", config.model, config.batch.precision, config.run.seed, tokenizer, runtime, folder.resume,
            config.optimizer, steps, config.batch.max_length, "model",
        )  # fmt: skip
        if folder.resume:
            checkpoint.load_training([actor], folder.resume)
        runtime.print(data.report())
        stream = mixture.stream(data.records, config.batch.global_batch_size, config.run.seed)
        timer = PhaseTimer()
        for step in range(folder.first_step, steps):
            with timer.phase("train") as phase:
                rows = stream.indices(step)
                batch = data.batch(shard_by_length(rows, data.lengths(rows), runtime.dp_rank, runtime.dp_size))
                actor.zero_grad()
                values = demonstration_gradient(actor, batch, config.batch.max_tokens_per_micro_batch)
                values |= actor.step()
                phase.tokens = int(batch.lengths_B.sum())
            values |= timer.report() | {"peak_memory_gib": peak_memory_gib()}
            if folder.finish_step(step + 1, values, [actor], {}):
                break
