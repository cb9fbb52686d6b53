"""Deal a rollout batch out anew over the data-parallel ranks, once it is known how long each answer has become.

Legend: N rows of the global batch, B = N / dp of them on this rank, L tokens of the longest, T = L - 1.
"""

import torch
from torch.nn.functional import pad

from megatron_safe.data.batches import TokenBatch
from megatron_safe.data.sampler import deal
from megatron_safe.rollout.generate import Trajectories
from megatron_safe.runtime import Runtime


def balance(
    trajectories: Trajectories, red_team_B: torch.Tensor, mini_batch_size: int, pad_id: int, runtime: Runtime
) -> tuple[Trajectories, torch.Tensor, torch.Tensor]:
    """Give each rank as many rows of each mini-batch as any other, and about as many tokens.

    A mini-batch holds the rows that it holds in one process, so that only who computes them depends on the layout. One
    all-gather each of lengths, tokens and log-probabilities; with one rank everything stays as it is.

    Args:
        trajectories: the rows `rank::dp` of the global batch.
        red_team_B: bool, goes with them.
        mini_batch_size: rows of the global batch that are trained on together; a multiple of dp that divides N.

    Returns:
        This rank's new rows, those of the first mini-batch first: trajectories and red_team_B; and rows_N, for
        `in_global_order`.
    """
    batch, ranks = trajectories.batch, runtime.dp_size
    if ranks == 1:
        return trajectories, red_team_B, torch.arange(len(batch), device=runtime.device)
    facts_B = [batch.lengths_B, batch.prompt_lengths_B, trajectories.ended_B.long(), red_team_B.long()]
    facts_N4 = runtime.gather_over_data_parallel(torch.stack(facts_B, dim=1))
    lengths = facts_N4[:, 0].tolist()
    rows: list[list[int]] = [[] for _ in range(ranks)]
    for start in range(0, len(lengths), mini_batch_size):
        for rank, hand in enumerate(deal(lengths[start : start + mini_batch_size], ranks)):
            rows[rank] += [start + place for place in hand]
    mine_B = torch.tensor(rows[runtime.dp_rank], device=runtime.device)
    longest, own_longest = max(lengths), max(lengths[row] for row in rows[runtime.dp_rank])

    def swap(rows_BX: torch.Tensor, lost: int, value: int) -> torch.Tensor:
        widened = pad(rows_BX, (0, longest - lost - rows_BX.size(1)), value=value)  # the ranks' longest rows differ
        return runtime.gather_over_data_parallel(widened)[mine_B, : own_longest - lost]

    lengths_B, prompt_lengths_B, ended_B, red_team_B = facts_N4[mine_B].unbind(dim=1)
    tokens_BL = swap(batch.tokens_BL, 0, pad_id)
    log_probs_BT = swap(trajectories.log_probs_BT, 1, 0)
    rows_N = torch.tensor(rows, device=runtime.device).T.flatten()
    dealt = Trajectories(TokenBatch(tokens_BL, prompt_lengths_B, lengths_B), log_probs_BT, ended_B.bool())
    return dealt, red_team_B.bool(), rows_N


def in_global_order(values_B: torch.Tensor, rows_N: torch.Tensor, runtime: Runtime) -> torch.Tensor:
    """[N], what every rank has of the rows that `balance` gave it, in the order of the global batch, on every rank."""
    gathered_N = runtime.gather_over_data_parallel(values_B)
    return torch.empty_like(gathered_N).index_copy_(0, rows_N, gathered_N)
