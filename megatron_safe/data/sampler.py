"""Which rows are in the batch of a step: a pure function of seed and step, so a resumed run needs only its step."""

import numpy as np

from megatron_safe.errors import UserError


class ShuffledStream:
    """An endless sequence of row indices, shuffled anew in each epoch, cut into full batches.

    A batch may span two epochs, so none is ever short and every row is used equally often.

    size: rows in the dataset. batch_size: rows in a global batch. seed: 0 or more. number: sequences of another number
    are shuffled independently.
    UserError where one is out of range.
    """

    def __init__(self, size: int, batch_size: int, seed: int, number: int = 0):
        for name, value, least in (("dataset size", size, 1), ("batch size", batch_size, 1), ("seed", seed, 0)):
            if value < least:
                raise UserError(f"{name}: expected {least} or more, found {value}")
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.number = number
        self._cached: tuple[int, np.ndarray] | None = None  # the last epoch's order; saves a shuffle per step

    def indices(self, step: int) -> list[int]:
        """The `batch_size` row indices of a step (from 0), the same whatever was asked before."""
        return [self.index(place) for place in range(step * self.batch_size, (step + 1) * self.batch_size)]

    def index(self, place: int) -> int:
        """The row at a place of the sequence, from 0."""
        return int(self._order(place // self.size)[place % self.size])

    def _order(self, epoch: int) -> np.ndarray:
        if self._cached is None or self._cached[0] != epoch:
            # Sorting raw Philox words, not Generator.permutation: numpy promises the words for all its versions.
            key = np.array([self.seed, epoch], dtype=np.uint64)
            counter = np.array([0, 0, 0, self.number], dtype=np.uint64)  # rows count up its other end
            words = np.random.Philox(key=key, counter=counter).random_raw(self.size)
            self._cached = epoch, np.argsort(words, kind="stable")
        return self._cached[1]


def shard(indices: list[int], rank: int, world: int) -> list[int]:
    """The part of a global batch that data-parallel `rank` of `world` works on; UserError where it does not divide."""
    _check_divides(len(indices), world)
    return indices[rank::world]


def shard_by_length(indices: list[int], lengths: list[int], rank: int, world: int) -> list[int]:
    """As `shard`, but with about the same number of tokens for each; lengths: of each index, in tokens."""
    return [indices[place] for place in deal(lengths, world)[rank]]


def deal(sizes: list[int], world: int) -> list[list[int]]:
    """Places of `sizes`, the same number for each of `world` data-parallel ranks, with about equal sums.

    In rounds of one for each, largest sizes first, the largest of a round to the rank that has least so far. So the
    sums differ by no more than the sizes of some one round do. A pure function: all ranks agree without asking. The
    places of a rank ascend.

    UserError where it does not divide.
    """
    _check_divides(len(sizes), world)
    largest_first = sorted(range(len(sizes)), key=lambda place: -sizes[place])
    hands: list[list[int]] = [[] for _ in range(world)]
    sums = [0] * world
    for start in range(0, len(sizes), world):
        least_first = sorted(range(world), key=lambda rank: sums[rank])
        for rank, place in zip(least_first, largest_first[start : start + world], strict=True):
            hands[rank].append(place)
            sums[rank] += sizes[place]
    return [sorted(hand) for hand in hands]


def _check_divides(size: int, world: int) -> None:
    if size % world:
        raise UserError(f"batch size: expected a multiple of the data-parallel size {world}, found {size}")
