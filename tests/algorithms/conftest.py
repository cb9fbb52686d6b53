"""What the tests of the maths share: awkward masks, and gradients of plain Python functions.

Shapes: B sequences, T action columns. A span (first, length) is one row's run of sampled tokens; length 0 is a row
without any.
"""

import math
from collections.abc import Callable

import pytest
import torch

SPANS_BY_NAME = {
    "ragged": (6, [(0, 6), (2, 3), (5, 1), (0, 1), (3, 0), (1, 5)]),
    "one sample": (5, [(1, 3)]),
    "one column": (1, [(0, 1), (0, 0), (0, 1)]),
    "one sample, one column": (1, [(0, 1)]),
    "every row empty": (4, [(0, 0), (2, 0)]),
}


def _mask_BT(T: int, spans: list[tuple[int, int]]) -> torch.Tensor:
    return torch.tensor([[first <= t < first + length for t in range(T)] for first, length in spans])


def _numeric_gradient(function: Callable[[list], float], x: torch.Tensor) -> torch.Tensor:
    """Central differences of a function of nested lists."""
    step = 1e-6
    gradient = torch.zeros_like(x)
    for index in range(x.numel()):
        shifted = []
        for sign in (1, -1):
            moved = x.detach().clone()
            moved.view(-1)[index] += sign * step
            shifted.append(function(moved.tolist()))
        gradient.view(-1)[index] = (shifted[0] - shifted[1]) / (2 * step)
    return gradient


@pytest.fixture(params=SPANS_BY_NAME.values(), ids=SPANS_BY_NAME.keys())
def mask_BT(request) -> torch.Tensor:
    T, spans = request.param
    return _mask_BT(T, spans)


@pytest.fixture(scope="session")
def mask_from_spans() -> Callable[[int, list[tuple[int, int]]], torch.Tensor]:
    return _mask_BT


@pytest.fixture(scope="session")
def numeric_gradient() -> Callable[[Callable[[list], float], torch.Tensor], torch.Tensor]:
    return _numeric_gradient


@pytest.fixture(scope="session")
def random_BT() -> Callable[..., torch.Tensor]:
    """float64 noise of the mask's shape; `junk` is put outside the mask, to see whether it leaks."""

    def draw(mask_BT: torch.Tensor, seed: int, scale: float = 1.0, junk: float | None = None) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        x_BT = scale * torch.randn(mask_BT.shape, generator=generator, dtype=torch.float64)
        return x_BT if junk is None else torch.where(mask_BT, x_BT, junk)

    return draw


@pytest.fixture(scope="session")
def log_sigmoid() -> Callable[[float], float]:
    return lambda x: -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))
