#!/usr/bin/env python3
"""One side of tools/benchmark_step.py as a program of its own: `step_side.py WORKLOAD SIDE`, told what to do on stdin.

SIDE is `rival` or a layout of ours, which is started under `torchrun` where it has two processes.

Legend: B samples, b those of this data-parallel rank, P prompt tokens.
"""

import contextlib
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_safe.config import (
    LagrangeConfig,
    ModelConfig,
    ParallelConfig,
    PpoConfig,
    PpoTrainingConfig,
    RolloutConfig,
)

PHASES = ("generate", "score", "train")
LAYOUTS = {"one": (1, 1, 1), "tp2": (2, 1, 1), "pp2": (1, 2, 1), "dp2": (1, 1, 2)}
"""(tensor, pipeline, data) parallel sizes."""
REPORT = "benchmark_step: "  # begins the lines that a side answers with; others may print too
NEVER = -1  # an end of sequence that no model draws


@dataclass(frozen=True)
class Workload:
    """Six models of one shape, and `prompts` prompts of `prompt_length` tokens for one rollout and one update.

    `mean_new_tokens` None makes every answer `max_new_tokens` long. A forward with (train) and without (score)
    gradients takes so many tokens with us and so many padded rows with the rival.
    """

    model: ModelConfig
    vocab_size: int
    prompts: int
    prompt_length: int
    max_new_tokens: int
    mean_new_tokens: float | None
    score_tokens: int
    train_tokens: int
    rival_score_rows: int
    rival_train_rows: int

    def limits_B(self) -> torch.Tensor:
        """Answer lengths, int64: geometric by inversion, cut at the cap."""
        if self.mean_new_tokens is None:
            return torch.full((self.prompts,), self.max_new_tokens)
        uniform_B = torch.rand(self.prompts, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        lengths_B = torch.log1p(-uniform_B) / math.log1p(-1 / self.mean_new_tokens)
        return (1 + lengths_B.long()).clamp(max=self.max_new_tokens)

    def prompts_BP(self, index: int) -> torch.Tensor:
        """The prompts of a repeat."""
        generator = torch.Generator().manual_seed(index)
        return torch.randint(self.vocab_size, (self.prompts, self.prompt_length), generator=generator)

    def settings(self) -> PpoConfig:
        """What both sides train with."""
        return PpoConfig(
            rollout=RolloutConfig(max_new_tokens=self.max_new_tokens, max_prompt_length=self.prompt_length),
            ppo=PpoTrainingConfig(
                rollout_batch_size=self.prompts,
                mini_batch_size=self.prompts,
                max_tokens_per_micro_batch=self.train_tokens,
                max_tokens_per_score_micro_batch=self.score_tokens,
            ),
            lagrange=LagrangeConfig(lambda_min=0.01),
        )


SMALL = ModelConfig(
    num_layers=4, hidden_size=256, ffn_hidden_size=688, num_attention_heads=4, max_sequence_length=128
)  # fmt: skip
WORKLOADS = {
    "A": Workload(SMALL, 2048, 32, 16, 64, None, 1280, 640, 32, 32),
    "B": Workload(SMALL, 2048, 256, 16, 64, 24.0, 1280, 640, 32, 32),
    "tiny": Workload(
        ModelConfig(num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=2, vocab_multiple=16,
                    max_sequence_length=32),
        64, 8, 5, 9, 4.0, 40, 40, 4, 4,
    ),
}  # fmt: skip


class Ours:
    """The project's own step, as `training.ppo_lag.run` takes it, on this rank's rows."""

    def __init__(self, workload: Workload, runtime):
        from megatron_safe.algorithms.lagrange import LagrangeMultiplier
        from megatron_safe.models.roles import HEADS, Role
        from megatron_safe.training.ppo_lag import multiplier_settings

        self.workload, self.runtime, self.config = workload, runtime, workload.settings()
        optimizers = {"actor": self.config.actor_optimizer} | dict.fromkeys(
            ("reward_critic", "cost_critic"), self.config.critic_optimizer
        )
        self.roles = {
            name: Role(name, workload.model, runtime, workload.vocab_size, "fp32", seed, optimizers.get(name), 1000)
            for seed, name in enumerate(HEADS)
            if name != "critic"  # the rival has two
        }
        self.multiplier = LagrangeMultiplier(**multiplier_settings(self.config.lagrange))
        self.rows_b = torch.arange(runtime.dp_rank, workload.prompts, runtime.dp_size)
        self.limits_b = workload.limits_B()[self.rows_b]

    def generate(self, index: int):
        from megatron_safe.data.batches import TokenBatch
        from megatron_safe.rollout.generate import generate

        lengths_b = torch.full_like(self.rows_b, self.workload.prompt_length)
        prompts = TokenBatch(self.workload.prompts_BP(index)[self.rows_b], lengths_b, lengths_b)
        sample_ids_b = index * self.workload.prompts + self.rows_b
        return generate(
            self.roles["actor"], prompts, sample_ids_b, self.config.rollout, 0, NEVER, 0, max_new_tokens_B=self.limits_b
        )

    def score(self, trajectories):
        from megatron_safe.rollout.balance import balance
        from megatron_safe.training.experience import score

        trajectories, _, self.rows_N = balance(
            trajectories, torch.zeros_like(trajectories.ended_B), self.config.ppo.mini_batch_size, 0, self.runtime
        )
        return score(self.roles, trajectories, self.config.ppo, self.config.rollout.temperature)

    def train(self, index: int, scores) -> dict[str, float]:
        from megatron_safe.rollout.balance import in_global_order
        from megatron_safe.training.ppo_lag import train

        self.multiplier.step(index, in_global_order(scores.costs_B, self.rows_N, self.runtime))
        _, measured = train(self.config, self.roles, scores, self.multiplier.value, None, index, self.runtime)
        return measured

    def tokens(self, trajectories) -> int:
        return int(self.runtime.sum_over_data_parallel({"tokens": float(trajectories.mask_BT.sum())})["tokens"])

    def wait(self) -> None:
        """A phase ends when its last rank has."""
        self.runtime.barrier()


class Theirs:
    """The rival behind the same five verbs."""

    def __init__(self, workload: Workload):
        from rival_step import Rival

        self.workload = workload
        self.rival = Rival(
            workload.settings(), workload.model, workload.vocab_size, workload.rival_score_rows,
            workload.rival_train_rows,
        )  # fmt: skip
        self.limits_B = workload.limits_B()

    def generate(self, index: int):
        tokens_BP = self.workload.prompts_BP(index)
        return self.rival.generate(tokens_BP, torch.ones_like(tokens_BP), self.limits_B, index)

    def score(self, rollout):
        return self.rival.score(rollout)

    def train(self, index: int, scored) -> dict[str, float]:
        return self.rival.train(scored)

    def tokens(self, rollout) -> int:
        return int(rollout.mask_BT.sum())

    def wait(self) -> None:
        pass


def timed_step(side: Ours | Theirs, index: int) -> dict:
    """One whole step: seconds of its phases, and answer tokens made."""
    side.wait()
    marks = [time.perf_counter()]

    def mark() -> None:
        side.wait()
        marks.append(time.perf_counter())

    trajectories = side.generate(index)
    mark()
    experience = side.score(trajectories)
    mark()
    side.train(index, experience)
    mark()
    seconds = {phase: marks[i + 1] - marks[i] for i, phase in enumerate(PHASES)}
    return {"seconds": seconds | {"step": marks[-1] - marks[0]}, "tokens": side.tokens(trajectories)}


def memory_bytes(field: str) -> int | None:
    """`VmRSS` or `VmHWM` (its peak) of this process; None where there is no /proc."""
    # Not getrusage: its peak is inherited from the process that started this one.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return None


def serve(workload: Workload, side: str) -> None:
    """A side's program: a step for each line of standard input, an answer for each; rank 0 reads and answers."""
    import torch._dynamo  # noqa: F401  the first optimizer step of either side imports it

    if side == "rival":
        import rival_step  # noqa: F401  before memory is read: imports are no side's peak
    else:
        from megatron_safe.runtime import start
        from megatron_safe.training import ppo_lag  # noqa: F401
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    imported = memory_bytes("VmRSS")

    with contextlib.ExitStack() as stack:
        if side == "rival":
            contender, main = Theirs(workload), True
        else:
            tp, pp, _ = LAYOUTS[side]
            # Between two turns a rank waits for all the other sides.
            runtime = stack.enter_context(start(ParallelConfig(tp, pp, timeout_seconds=7200.0), 0))
            contender, main = Ours(workload, runtime), runtime.is_main
        answer = {"ready": side}
        while True:
            if main:
                print(REPORT + json.dumps(answer), flush=True)
            lines = [sys.stdin.readline() if main else None]
            if side != "rival":
                torch.distributed.broadcast_object_list(lines)
            command, _, argument = lines[0].strip().partition(" ")
            if command == "step":
                answer = timed_step(contender, int(argument))
                peak = memory_bytes("VmHWM")
                answer["peak_bytes"] = peak and peak - imported
            elif command == "trace":
                with torch.profiler.profile() as profile:
                    timed_step(contender, 0)
                if main:
                    profile.export_chrome_trace(argument)
                answer = {"trace": argument}
            else:  # "stop", or whoever asked is gone
                return


if __name__ == "__main__":
    serve(WORKLOADS[sys.argv[1]], sys.argv[2])
