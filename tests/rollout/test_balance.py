"""Rollout batches dealt out anew over data-parallel ranks, which check their rows in programs/balance_rollouts.py."""

import torch

from megatron_safe.config import ParallelConfig
from megatron_safe.data.batches import collate
from megatron_safe.rollout.balance import balance, in_global_order
from megatron_safe.rollout.generate import Trajectories
from megatron_safe.runtime import start


def test_every_rank_has_its_rows_and_about_as_many_tokens(torchrun):
    torchrun(3, "balance_rollouts.py")


def test_one_process_keeps_everything_as_it_is():
    batch = collate([([4, 5, 6], 1), ([7, 8], 1), ([9, 9, 9, 9], 2)], 0)
    trajectories = Trajectories(batch, torch.randn(3, 3), torch.tensor([True, False, True]))
    red_team_B = torch.tensor([False, True, True])
    with start(ParallelConfig(), 0) as runtime:
        found, found_red_B, rows_N = balance(trajectories, red_team_B, 3, 0, runtime)
        assert found is trajectories and found_red_B is red_team_B
        assert in_global_order(batch.lengths_B, rows_N, runtime).tolist() == [3, 2, 4]
