"""Batches through a role's pipeline stages, with Megatron's schedules.

Legend: B rows on this data-parallel rank, S sequence.
"""

from collections.abc import Callable
from functools import partial

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_safe.models.roles import Role

MicroBatch = dict[str, torch.Tensor]
"""`tokens` [b, S] is what the model reads; the rest is for the loss. Every tensor is split along dim 0."""


def micro_batches(batch: MicroBatch, micro_batch_size: int) -> list[MicroBatch]:
    """Split [B, ...] into B / micro_batch_size parts; B must be a multiple."""
    rows = batch["tokens"].size(0)
    assert rows % micro_batch_size == 0, (rows, micro_batch_size)
    return [
        {name: tensor[start : start + micro_batch_size] for name, tensor in batch.items()}
        for start in range(0, rows, micro_batch_size)
    ]


def largest_divisor(rows: int, at_most: int) -> int:
    """The largest micro-batch size up to `at_most` that divides `rows`: Megatron's schedules want equal shapes."""
    return next(size for size in range(min(rows, max(1, at_most)), 0, -1) if rows % size == 0)


def _schedule(role: Role, batches: list[MicroBatch], model, finish, forward_only: bool, collect: bool) -> list:
    rows, length = batches[0]["tokens"].shape

    def forward_step(iterator, model):
        batch = next(iterator)
        return model(batch["tokens"]), partial(finish, batch)

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=rows,
        forward_only=forward_only,
        collect_non_loss_data=collect,
    )


@torch.no_grad()
def forward(
    role: Role, batch: MicroBatch, read: Callable[[torch.Tensor, MicroBatch], torch.Tensor], micro_batch_size: int
) -> torch.Tensor:
    """What `read` makes of the last stage's output, on every stage.

    Args:
        batch: [B, ...].
        read: (output, micro-batch) -> fp32 tensor [b, ...] with trailing shape equal to that of `batch["like"]`.
        micro_batch_size: the most rows at a time.
    """
    rows = batch["tokens"].size(0)
    parts = micro_batches(batch, largest_divisor(rows, micro_batch_size))

    def finish(part, output, non_loss_data):
        return read(output, part)

    results = _schedule(role, parts, role.module, finish, forward_only=True, collect=True)
    runtime = role.runtime
    if runtime.is_last_stage:
        result = torch.cat(results).contiguous()
    else:
        result = torch.empty_like(batch["like"], dtype=torch.float32)
    return runtime.broadcast_from_last_stage(result)


def forward_backward(
    role: Role,
    batch: MicroBatch,
    loss: Callable[[torch.Tensor, MicroBatch], tuple[torch.Tensor, dict[str, torch.Tensor]]],
    statistics: tuple[str, ...],
    micro_batch_size: int,
) -> dict[str, float]:
    """Add the gradient of a loss to the role's gradient buffers.

    Args:
        loss: (output, micro-batch) -> (scalar, {name: scalar}). Both are SUMS: over the global batch they must add
            up to what is meant, so a mean divides by the number of sequences (or tokens) in the GLOBAL batch.
        statistics: the names that `loss` returns.

    Returns:
        The statistics, summed over micro-batches and data-parallel ranks; the same on every rank.
    """

    def finish(part, output):
        value, measured = loss(output, part)
        # A clone: the schedule scales the returned loss in place, and a detached alias would be scaled with it.
        row = torch.stack([measured[name].detach().double() for name in statistics]).clone()
        return value, torch.zeros((), dtype=torch.int, device=value.device), row

    rows = _schedule(
        role, micro_batches(batch, micro_batch_size), role.trainable, finish, forward_only=False, collect=False
    )
    runtime = role.runtime
    if runtime.is_last_stage:
        total = torch.stack(rows).sum(dim=0)
    else:
        total = torch.empty(len(statistics), dtype=torch.float64, device=runtime.device)
    total = runtime.broadcast_from_last_stage(total)
    return runtime.sum_over_data_parallel(dict(zip(statistics, total.tolist(), strict=True)))
