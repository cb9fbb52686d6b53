"""Vocabulary shards without processes: p ranks as p threads that meet at a barrier for each collective. And both
backends: Triton's interpreter stands in for a GPU."""

import math
import threading

import pytest
import torch
import torch.distributed as dist

from megatron_safe.kernels.backend import set_backend

CUDA = torch.cuda.is_available()
PATHS = [
    "torch",
    pytest.param("triton", marks=pytest.mark.skipif(CUDA, reason="no interpreter where there is a GPU: -m gpu")),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]),
]


class _Meeting:
    def __init__(self, size: int):
        self.barrier = threading.Barrier(size, timeout=60)
        self.brought: list = [None] * size
        self.turn = threading.Lock()  # Triton's interpreter keeps its state in globals: one rank at a time

    def exchange(self, rank: int, tensor: torch.Tensor) -> list[torch.Tensor]:
        self.brought[rank] = tensor.clone()
        self.turn.release()
        try:
            self.barrier.wait()
            everything = list(self.brought)
            self.barrier.wait()  # nobody brings the next tensor before all have looked
        finally:
            self.turn.acquire()
        return everything


class _Group:
    """As much of a ProcessGroup as the kernels ask for."""

    def __init__(self, rank: int, meeting: _Meeting):
        self._rank, self.meeting = rank, meeting

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return len(self.meeting.brought)


def _all_gather(parts, tensor, group):
    for part, other in zip(parts, group.meeting.exchange(group.rank(), tensor), strict=True):
        part.copy_(other)


def _all_reduce(tensor, group):
    tensor.copy_(sum(group.meeting.exchange(group.rank(), tensor)))


@pytest.fixture(scope="module")  # not longer: other files use the real collectives
def on_shards():
    """on_shards(p, f): what f(rank, group) returns on each of p ranks. An error on one is raised here."""

    def run(size: int, function) -> list:
        meeting = _Meeting(size)
        results, errors = [None] * size, []

        def work(rank: int) -> None:
            try:
                with meeting.turn:
                    results[rank] = function(rank, _Group(rank, meeting))
            except BaseException as error:
                errors.append(error)
                meeting.barrier.abort()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather", _all_gather)
        patch.setattr(dist, "all_reduce", _all_reduce)
        yield run


@pytest.fixture
def triton_backend(monkeypatch):
    """Triton for every kernel, and NaN (-12345) in whatever it allocates with `new_empty`: all must be written."""
    pytest.importorskip("triton")
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *size, **options):
        tensor = new_empty(self, *size, **options)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -12345)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    set_backend("triton")
    yield
    set_backend("auto")


@pytest.fixture(params=PATHS)
def device(request, monkeypatch):
    """Every path; what it allocates without filling is poisoned."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(math.nan))
    set_backend("torch" if request.param == "torch" else "triton")
    yield "cuda" if request.param == "cuda" else "cpu"
    set_backend("auto")
