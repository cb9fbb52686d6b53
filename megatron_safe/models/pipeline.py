"""Rows through a role's pipeline stages in packs, with Megatron's schedules.

Legend: B rows of S columns on this data-parallel rank, N places that are read, n of them in a pack, T tokens of a pack.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_safe.models.packing import Pack, Sequences, pack
from megatron_safe.models.roles import Role

Inputs = dict[str, torch.Tensor]
"""What a head or a loss needs besides the model's output: tensors of one row [N, ...] for each place that is read."""


def _packs(role: Role, sequences: Sequences, max_tokens: int, together: int = 1) -> list[Pack]:
    # Two packs a stage and step keep a pipeline busy; its stages pass on tensors of one shape.
    runtime = role.runtime
    stages = runtime.pp_size
    at_least = 1 if stages == 1 else 2 * stages
    multiple = runtime.tp_size if runtime.parallel.sequence_parallel else 1
    share = runtime.cp_rank, runtime.cp_size
    # An interleaved pipeline takes packs in rounds, one for each stage.
    round_of = stages if runtime.parallel.virtual_pipeline_model_parallel_size > 1 else 1
    return pack(sequences, max_tokens, at_least, together, stages > 1, multiple, share, round_of)


def _schedule(role: Role, packs: list[Pack], chunks: list, finish, forward_only: bool, collect: bool) -> list:
    def forward_step(iterator, model):
        pack = next(iterator)
        return model(pack), partial(finish, pack)

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(packs) for _ in chunks],
        model=chunks,
        num_microbatches=len(packs),
        seq_length=packs[0].tokens_1T.size(1) * role.runtime.cp_size,  # which the schedules divide by
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=collect,
    )


def _of(pack: Pack, inputs: Inputs) -> Inputs:
    return {name: tensor.index_select(0, pack.places_N) for name, tensor in inputs.items()}


@torch.no_grad()
def forward(
    role: Role,
    sequences: Sequences,
    max_tokens: int,
    read: Callable[[torch.Tensor, Inputs], torch.Tensor],
    inputs: Inputs | None = None,
    shape: tuple[int, ...] = (),
) -> torch.Tensor:
    """What `read` makes of the last stage's output at each place, [N, *shape] fp32, on every stage.

    Args:
        max_tokens: of a pack.
        read: (output [n] or [n, h], inputs of these places) -> [n, *shape].
    """
    packs, runtime = _packs(role, sequences, max_tokens), role.runtime
    result_N = torch.zeros(int(sequences.read_BS.sum()), *shape, dtype=torch.float32, device=runtime.device)

    def finish(pack, output, non_loss_data):
        result_N[pack.places_N] = read(output, _of(pack, inputs or {})).float()

    _schedule(role, packs, role.chunks, finish, forward_only=True, collect=True)
    return runtime.broadcast_from_last_stage(runtime.sum_over_context_parallel(result_N))


def forward_backward(
    role: Role,
    sequences: Sequences,
    max_tokens: int,
    loss: Callable[[torch.Tensor, Inputs], tuple[torch.Tensor, dict[str, torch.Tensor]]],
    statistics: tuple[str, ...],
    inputs: Inputs | None = None,
    together: int = 1,
    more_follow: bool = False,
) -> dict[str, float]:
    """Add the gradient of a loss to the role's gradient buffers.

    Args:
        max_tokens: of a pack.
        loss: (output [n] or [n, h], inputs of these places) -> (scalar, {name: scalar}). Both are SUMS: over the global
            batch they must add up to what is meant, so a mean divides by the sequences (or tokens) of the GLOBAL batch.
            With context parallelism a rank may have some places of a row only, or none; n is then 0.
        statistics: the names that `loss` returns.
        together: so many neighbouring rows go into one pack, in order.
        more_follow: another call adds to the gradient before the role's step.

    Returns:
        The statistics, summed over packs and data-parallel ranks; the same on every rank.
    """

    def finish(pack, output):
        value, measured = loss(output, _of(pack, inputs or {}))
        # A clone: the schedule scales the returned loss in place, and a detached alias would be scaled with it.
        row = torch.stack([measured[name].detach().double() for name in statistics]).clone()
        return value, torch.zeros((), dtype=torch.int, device=value.device), row

    packs = _packs(role, sequences, max_tokens, together)
    with role.without_reduction() if more_follow else nullcontext():
        rows = _schedule(role, packs, role.trainable, finish, forward_only=False, collect=False)
    runtime = role.runtime
    if runtime.is_last_stage:
        total = runtime.sum_over_context_parallel(torch.stack(rows).sum(dim=0))
    else:
        total = torch.empty(len(statistics), dtype=torch.float64, device=runtime.device)
    total = runtime.broadcast_from_last_stage(total)
    return runtime.sum_over_data_parallel(dict(zip(statistics, total.tolist(), strict=True)))
