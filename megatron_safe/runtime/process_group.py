"""One torch.distributed world and Megatron's parallel state over it.

Ranks come from the environment that `torchrun` sets (`RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR`,
`MASTER_PORT`); without it the process is a world of one.
"""

import dataclasses
import datetime
import os
import random
from collections.abc import Callable
from contextlib import contextmanager
from typing import TypeVar

import numpy
import torch
import torch.distributed as dist

from megatron_safe.config import ParallelConfig
from megatron_safe.errors import UserError, Waiting

Result = TypeVar("Result")
_SHARED_ERRORS = (UserError, Waiting, OSError)


@dataclasses.dataclass(frozen=True)
class Runtime:
    """Where this process stands: its device, its coordinates in the layout TP x PP x CP x DP, and the settings of
    that. The context-parallel ranks of a replica have the same rows."""

    device: torch.device
    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    cp_rank: int = 0
    cp_size: int = 1
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)

    @property
    def is_main(self) -> bool:
        """Rank 0: the only one that prints and writes metrics."""
        return self.rank == 0

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    def print(self, text: str) -> None:
        if self.is_main:
            print(text, flush=True)

    def barrier(self) -> None:
        dist.barrier()

    def on_main(self, act: Callable[[], Result]) -> Result:
        """Run `act` on rank 0 alone; every rank returns its result, or raises what it raised.

        The other ranks wait for as long as that takes. The result must be picklable. A UserError, Waiting or OSError is
        raised as such everywhere; anything else is a RuntimeError on the ranks above 0.
        """
        if self.world_size == 1:
            return act()
        # The world's own timeout would end a long wait. gloo's sockets, unlike a timeout, tell at once who has died.
        group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=14))
        failure = None
        told: list = [None, None, None]  # the result; or the kind of the failure, and its words
        if self.is_main:
            try:
                told[0] = act()
            except Exception as error:
                failure = error
                kind = next((kind.__name__ for kind in _SHARED_ERRORS if isinstance(error, kind)), "RuntimeError")
                told = [None, kind, str(error) or repr(error)]
        dist.broadcast_object_list(told, src=0, group=group, device=torch.device("cpu"))
        dist.destroy_process_group(group)
        if failure is not None:
            raise failure
        result, kind, words = told
        if kind is not None:
            raise {error.__name__: error for error in _SHARED_ERRORS}.get(kind, RuntimeError)(words)
        return result

    def sum_over_data_parallel(self, values: dict[str, float]) -> dict[str, float]:
        """Sum named floats (in float64) over the data-parallel ranks; every rank gets the same result."""
        if self.dp_size == 1:
            return values
        group = _parallel_state().get_data_parallel_group()
        packed = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(packed, group=group)
        return dict(zip(values, packed.tolist(), strict=True))

    def sum_over_context_parallel(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum of the context-parallel ranks' tensors, on each of them."""
        if self.cp_size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor, group=_parallel_state().get_context_parallel_group())
        return tensor

    def gather_over_data_parallel(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of every data-parallel rank, in the order of the global batch.

        Args:
            rows: [B/dp, ...], the rows `rank::dp_size` of a global batch; the same shape on each rank.

        Returns:
            [B, ...], row i of the result is row i of the global batch.
        """
        if self.dp_size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.dp_size)]
        dist.all_gather(parts, rows.contiguous(), group=_parallel_state().get_data_parallel_group())
        return torch.stack(parts, dim=1).flatten(0, 1)

    def broadcast_from_last_stage(self, tensor: torch.Tensor) -> torch.Tensor:
        """In place: every pipeline stage receives the last stage's tensor (shape and dtype agreed beforehand)."""
        if self.pp_size > 1:
            state = _parallel_state()
            dist.broadcast(
                tensor,
                src=state.get_pipeline_model_parallel_last_rank(),
                group=state.get_pipeline_model_parallel_group(),
            )
        return tensor


def _parallel_state():
    from megatron.core import parallel_state

    return parallel_state


def check_layout(parallel: ParallelConfig, world_size: int) -> None:
    """Raise UserError when the layout does not fit the number of processes."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cp = parallel.context_parallel_size
    if min(tp, pp, cp) < 1 or world_size % (tp * pp * cp):
        context = f" x context_parallel_size {cp}" if cp != 1 else ""
        raise UserError(
            f"parallel: tensor_model_parallel_size {tp} x pipeline_model_parallel_size {pp}{context} = {tp * pp * cp} "
            f"does not divide the world of {world_size} process(es)"
        )
    if parallel.virtual_pipeline_model_parallel_size > 1 and pp == 1:
        raise UserError(
            "parallel.virtual_pipeline_model_parallel_size: expected a pipeline_model_parallel_size above 1, found 1"
        )
    if parallel.sequence_parallel and tp == 1:
        raise UserError("parallel.sequence_parallel: expected a tensor_model_parallel_size above 1, found 1")


@contextmanager
def start(parallel: ParallelConfig, seed: int):
    """Start the process group, yield a `Runtime`, and take everything down again, whatever happens inside.

    nccl on CUDA, gloo on the CPU. Every rank is seeded with `seed`: what must differ between ranks (sampling, data)
    is keyed by sample, not by the state of a generator.

    Raises:
        UserError: the layout does not fit the world, or the rendezvous failed.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    check_layout(parallel, world_size)
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        from megatron_safe.runtime import cpu

        cpu.answer_cuda_with_cpu()
        device = torch.device("cpu")
        backend = "gloo"

    timeout = datetime.timedelta(seconds=parallel.timeout_seconds)
    try:
        if "MASTER_ADDR" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            store = dist.TCPStore("127.0.0.1", 0, 1, True)  # port 0: any free one
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]  # a C++ stack trace may follow
        raise UserError(f"torch.distributed did not start on rank {rank} of {world_size}: {reason}") from error

    from megatron.core import parallel_state, tensor_parallel

    chunks = parallel.virtual_pipeline_model_parallel_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        context_parallel_size=parallel.context_parallel_size,
        distributed_timeout_minutes=max(1, int(parallel.timeout_seconds / 60)),
    )
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    try:
        yield Runtime(
            device=device,
            rank=rank,
            world_size=world_size,
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            tp_size=parallel_state.get_tensor_model_parallel_world_size(),
            pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
            pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=parallel_state.get_data_parallel_world_size(),
            cp_rank=parallel_state.get_context_parallel_rank(),
            cp_size=parallel_state.get_context_parallel_world_size(),
            parallel=parallel,
        )
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()

