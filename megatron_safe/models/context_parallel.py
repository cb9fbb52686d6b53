"""Context parallelism: which rank has which tokens of a pack, and how it comes by the keys of the others.

A sequence is cut into 2 c pieces for c ranks, and piece i goes with piece 2 c - 1 - i: a late piece, which attends to
much, with an early one, so that ranks have as many tokens and as much to do.

Legend: T tokens of a pack, t of them on each rank (with padding), K keys for the pieces of a rank, G key/value heads,
D head size.
"""

from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region


@dataclass(frozen=True)
class Keys:
    """What the pieces on a rank attend to: each its sequence from the start to its own last token.

    rows_K: int64, for one piece after the other, among the t keys of every rank laid end to end.
    lengths: how many each piece has. offsets: int32 [pieces + 1], where they begin in rows_K.
    """

    rows_K: torch.Tensor
    lengths: tuple[int, ...]
    offsets: torch.Tensor

    def to(self, device: torch.device) -> "Keys":
        return Keys(self.rows_K.to(device), self.lengths, self.offsets.to(device))


def owners(lengths_n: torch.Tensor, position_T: torch.Tensor, together: int, ranks: int) -> torch.Tensor:
    """[T] int64: the rank of each token. Units of `together` sequences have their last tokens on one rank, the units
    in turn, so that short sequences are spread too."""
    if ranks == 1:
        return torch.zeros_like(position_T)
    unit_T = (torch.arange(len(lengths_n)) // together).repeat_interleave(lengths_n)
    piece_T = ((position_T + 1) * 2 * ranks - 1) // lengths_n.repeat_interleave(lengths_n)
    return (torch.minimum(piece_T, 2 * ranks - 1 - piece_T) + unit_T) % ranks


def local_rows(owner_T: torch.Tensor) -> torch.Tensor:
    """[T] int64: where each token is among its rank's."""
    counts = owner_T.bincount()
    place_T = torch.arange(len(owner_T)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return torch.empty_like(place_T).index_copy_(0, owner_T.argsort(stable=True), place_T)


def keys_of(
    owner_T: torch.Tensor, rank: int, own: torch.Tensor, positions: torch.Tensor, lengths: list[int], width: int
) -> Keys:
    """Keys of a rank's pieces, and last of its padding, if any, which attends to itself.

    Args:
        own: which of the T tokens the rank has: pieces of `lengths`, one after the other.
        positions: of these in their sequences.
        width: t.
    """
    where_T = owner_T * width + local_rows(owner_T)
    last = torch.tensor(lengths, dtype=torch.int64).cumsum(0) - 1
    counts, ends = (positions[last] + 1).tolist(), (own[last] + 1).tolist()
    rows = [where_T[end - count : end] for count, end in zip(counts, ends, strict=True)]
    if len(own) < width:
        rows.append(torch.arange(rank * width + len(own), (rank + 1) * width))
        counts.append(width - len(own))
    return Keys(torch.cat(rows), tuple(counts), torch.tensor([0, *counts]).cumsum(0).int())


def gather_keys(key_tGD: torch.Tensor, value_tGD: torch.Tensor, keys: Keys) -> tuple[torch.Tensor, torch.Tensor]:
    """[K, G, D] twice; backward adds up what all ranks' pieces say of a key."""
    both_t = torch.stack([key_tGD, value_tGD], dim=1)
    group = parallel_state.get_context_parallel_group()
    gathered = gather_from_sequence_parallel_region(both_t.flatten(1), tensor_parallel_output_grad=True, group=group)
    return gathered.index_select(0, keys.rows_K).unflatten(1, both_t.shape[1:]).unbind(1)
