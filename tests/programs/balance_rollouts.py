"""Started by torchrun: deal rollout batches out over data-parallel ranks and check every row on each of them."""

import dataclasses
import random

import torch

from megatron_safe.config import ModelConfig, ParallelConfig
from megatron_safe.data.batches import collate
from megatron_safe.models.roles import Role
from megatron_safe.rollout.balance import balance, in_global_order
from megatron_safe.rollout.generate import Trajectories
from megatron_safe.runtime import Runtime, start
from megatron_safe.training.experience import answer_log_probs
from megatron_safe.training.off_policy import verify

VOCABULARY, PAD = 29, 5
MODEL = ModelConfig(num_layers=1, hidden_size=16, ffn_hidden_size=24, num_attention_heads=2, max_sequence_length=96,
                    vocab_multiple=8, init_std=0.3)  # fmt: skip


def rollout(size: int, draw: random.Random) -> tuple[Trajectories, torch.Tensor]:
    """The global batch, the same on every rank: answers of 1 to 60 tokens, most of them short."""
    shapes = [(draw.randint(1, 9), min(60, 1 + int(draw.expovariate(1 / 12)))) for _ in range(size)]
    batch = collate([([draw.randrange(VOCABULARY) for _ in range(n + m)], n) for n, m in shapes], PAD)
    noise_BT = torch.tensor([[draw.gauss(-2, 1) for _ in row] for row in batch.response_mask_BT])
    ended_B, red_team_B = (torch.tensor([draw.random() < share for _ in shapes]) for share in (0.7, 0.3))
    return Trajectories(batch, torch.where(batch.response_mask_BT, noise_BT, 0.0), ended_B), red_team_B


def trimmed(trajectories: Trajectories, rows: torch.Tensor) -> Trajectories:
    """Some of the rows, no wider than the longest of them: as `generate` gives them, and as `balance` shall."""
    batch = trajectories.batch.select(rows)
    width = int(batch.lengths_B.max())
    batch = dataclasses.replace(batch, tokens_BL=batch.tokens_BL[:, :width])
    return Trajectories(batch, trajectories.log_probs_BT[rows, : width - 1], trajectories.ended_B[rows])


def check(size: int, mini: int, draw: random.Random, runtime: Runtime) -> list[tuple[int, int]]:
    """The longest and the shortest rank's tokens in each mini-batch, before, and after."""
    everything, red_team_N = rollout(size, draw)
    rank, ranks = runtime.dp_rank, runtime.dp_size
    before = torch.arange(rank, size, ranks)
    found, red_team_B, rows_N = balance(trimmed(everything, before), red_team_N[before], mini, PAD, runtime)
    mine = rows_N.view(-1, ranks)[:, rank]
    wanted = trimmed(everything, mine)
    for name in ("tokens_BL", "lengths_B", "prompt_lengths_B"):
        assert torch.equal(getattr(found.batch, name), getattr(wanted.batch, name)), name
    assert torch.equal(found.log_probs_BT, wanted.log_probs_BT) and torch.equal(found.ended_B, wanted.ended_B)
    assert torch.equal(red_team_B, red_team_N[mine])

    assert sorted(rows_N.tolist()) == list(range(size))
    assert torch.equal(mine // mini, torch.arange(size // mini).repeat_interleave(mini // ranks))
    lengths_N = everything.batch.lengths_B
    assert torch.equal(in_global_order(found.batch.lengths_B, rows_N, runtime), lengths_N)
    assert torch.equal(in_global_order(red_team_B, rows_N, runtime), red_team_N)
    spreads = []
    for order_N in (torch.arange(size), rows_N):
        tokens = lengths_N[order_N].view(size // mini, mini // ranks, ranks).sum(dim=1)
        spreads.append([int(spread) for spread in tokens.amax(dim=1) - tokens.amin(dim=1)])
    return list(zip(*spreads, strict=True))


def check_verify(runtime: Runtime) -> None:
    """What ranks measure on their rows is what one measures on all."""
    actor = Role("actor", MODEL, runtime, VOCABULARY, "fp32", 0)
    size, mini = 6 * runtime.dp_size, 3 * runtime.dp_size
    everything, red_team_N = rollout(size, random.Random(1))
    before = torch.arange(runtime.dp_rank, size, runtime.dp_size)
    mine, _, _ = balance(trimmed(everything, before), red_team_N[before], mini, PAD, runtime)
    _, measured = verify(actor, mine, 64, 1.0)
    differences = (answer_log_probs(actor, everything, 64, 1.0) - everything.log_probs_BT)[everything.mask_BT].double()
    wanted = {
        "rollout_logprob_difference": differences.abs().mean(),
        "rollout_logprob_difference_max": differences.abs().max(),
        "rollout_kl": (differences.expm1() - differences).mean(),
    }
    for name, value in wanted.items():
        torch.testing.assert_close(torch.tensor(measured[name]), value.float(), rtol=1e-5, atol=1e-6)


def main() -> None:
    with start(ParallelConfig(timeout_seconds=60.0), 0) as runtime:
        assert runtime.dp_size > 1
        spreads = []
        for seed in range(20):
            draw = random.Random(seed)
            mini = runtime.dp_size * draw.randint(1, 9)
            spreads += check(mini * draw.randint(1, 3), mini, draw, runtime)
        before, after = (sum(column) for column in zip(*spreads, strict=True))
        assert after < 0.4 * before, (before, after)
        check_verify(runtime)


if __name__ == "__main__":
    main()
