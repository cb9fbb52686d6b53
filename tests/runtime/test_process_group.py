"""One process: which layouts start, and that nothing is left behind."""

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_safe.config import ParallelConfig
from megatron_safe.errors import UserError
from megatron_safe.runtime import start
from megatron_safe.runtime.process_group import check_layout


@pytest.mark.parametrize(
    "tp, pp, world",
    [(2, 1, 1), (1, 3, 4), (2, 2, 6), (0, 1, 1), (1, 0, 4), (-1, -1, 1), (4, 4, 8)],
)
def test_a_layout_that_does_not_fit_is_named(tp, pp, world):
    message = (
        f"parallel: tensor_model_parallel_size {tp} x pipeline_model_parallel_size {pp} = {tp * pp} "
        f"does not divide the world of {world} process"
    )
    with pytest.raises(UserError) as refused:
        check_layout(ParallelConfig(tp, pp), world)
    assert str(refused.value).startswith(message)


def test_context_parallel_ranks_count_too():
    with pytest.raises(UserError) as refused:
        check_layout(ParallelConfig(2, 1, context_parallel_size=3), 8)
    assert "size 1 x context_parallel_size 3 = 6 does not divide the world of 8 process" in str(refused.value)
    check_layout(ParallelConfig(2, 2, context_parallel_size=2), 8)


def test_chunks_need_a_pipeline():
    with pytest.raises(UserError, match="parallel.virtual_pipeline_model_parallel_size: .* above 1, found 1"):
        check_layout(ParallelConfig(2, virtual_pipeline_model_parallel_size=2), 2)
    check_layout(ParallelConfig(1, 2, virtual_pipeline_model_parallel_size=2), 2)


def test_sequence_parallelism_needs_tensor_parallelism():
    with pytest.raises(UserError, match="parallel.sequence_parallel: .* above 1, found 1"):
        check_layout(ParallelConfig(sequence_parallel=True), 2)
    check_layout(ParallelConfig(2, sequence_parallel=True), 2)


def test_layouts_that_fit():
    for tp, pp, world in ((1, 1, 1), (1, 1, 7), (2, 1, 2), (2, 2, 8), (1, 4, 4)):
        check_layout(ParallelConfig(tp, pp), world)


def test_start_refuses_before_it_starts():
    with pytest.raises(UserError, match="= 2 does not divide the world of 1 process"):
        with start(ParallelConfig(tensor_model_parallel_size=2), 0):
            pass
    assert not dist.is_initialized()


def test_a_rendezvous_that_cannot_be_is_one_line(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="torch.distributed did not start on rank 0 of 1: .*RANK expected") as refused:
        with start(ParallelConfig(), 0):
            pass
    assert "\n" not in str(refused.value)
    assert not dist.is_initialized()


def test_one_process_is_first_last_and_main(capsys):
    with start(ParallelConfig(), 0) as runtime:
        assert (runtime.rank, runtime.world_size) == (0, 1)
        assert (runtime.tp_rank, runtime.tp_size, runtime.pp_rank, runtime.pp_size) == (0, 1, 0, 1)
        assert (runtime.dp_rank, runtime.dp_size) == (0, 1)
        assert runtime.is_main and runtime.is_first_stage and runtime.is_last_stage
        assert runtime.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
        rows = torch.arange(6).view(3, 2)
        assert torch.equal(runtime.gather_over_data_parallel(rows), rows)
        assert runtime.sum_over_data_parallel({"a": 1.5, "b": -2.0}) == {"a": 1.5, "b": -2.0}
        assert torch.equal(runtime.broadcast_from_last_stage(rows), rows)
        runtime.barrier()
        runtime.print("hello")
    assert capsys.readouterr().out == "hello\n"


def test_each_start_is_fresh():
    draws = []
    for seed in (3, 3, 4):
        with start(ParallelConfig(), seed) as runtime:
            assert dist.is_initialized() and parallel_state.model_parallel_is_initialized()
            with tensor_parallel.get_cuda_rng_tracker().fork():
                inside = torch.rand(4, device=runtime.device).tolist()
            draws.append((torch.rand(4).tolist(), inside))
        assert not dist.is_initialized() and not parallel_state.model_parallel_is_initialized()
    assert draws[0] == draws[1] != draws[2]


def test_an_error_inside_takes_everything_down_and_comes_out():
    with pytest.raises(ZeroDivisionError):
        with start(ParallelConfig(), 0):
            raise ZeroDivisionError
    assert not dist.is_initialized() and not parallel_state.model_parallel_is_initialized()
    with start(ParallelConfig(), 0) as runtime:
        assert runtime.world_size == 1
