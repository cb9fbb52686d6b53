#!/usr/bin/env python3
"""Measures a CPU's constants for `megatron-safe plan --machine FILE.json`.

    python tools/measure_machine.py --processes 1 --threads 2 --out one.json
    python tools/measure_machine.py --processes 2 --threads 1 --out two.json

A device is a process with so many threads; all processes measure at once, because they share caches and memory.
Products are those of a layer of hidden size 256 (FFN 688), cycling through weights as a model does; what does not
depend on sizes is the time of a model too small for anything else to matter. Takes about a minute, and only a quiet
machine gives numbers worth keeping.

Legend: B rows, P prompt tokens, S columns, N places that are read.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_safe.config import ModelConfig, OptimizerConfig, ParallelConfig, RolloutConfig
from megatron_safe.planning.memory import Sizes
from megatron_safe.planning.step_time import elementwise_bytes
from megatron_safe.rollout.decoder import Linear
from megatron_safe.runtime import start

MODEL = ModelConfig(num_layers=4, hidden_size=256, ffn_hidden_size=688, num_attention_heads=4, max_sequence_length=128)
TINY = dataclasses.replace(MODEL, num_layers=2, hidden_size=16, ffn_hidden_size=16, num_attention_heads=2)
DEEP = 10
"""Layers of the other tiny model; the difference is layers."""
ROWS = (1, 8, 32, 64, 128, 320, 640, 1280, 2560)
SECONDS = 0.4
"""For each constant, or three repeats if that is longer."""


def quartile_seconds(work) -> float:
    """Of one call: the lower quartile of repeats that all processes start together, as other programs only add time."""
    work()
    found, end = [], time.perf_counter() + SECONDS
    count = torch.zeros(1)
    while len(found) < 3 or count.item() > 0:
        dist.barrier()
        begin = time.perf_counter()
        work()
        found.append(time.perf_counter() - begin)
        # As long as anybody has time left, so that the others' work is as heavy as it was.
        count.fill_(float(time.perf_counter() < end))
        dist.all_reduce(count)
    return statistics.quantiles(found, n=4)[0]


def products(dtype: torch.dtype, of=lambda weight: partial(torch.nn.functional.linear, weight=weight)) -> list:
    """(rows, FLOP/s) of a layer's products; `of` a weight is what multiplies with it."""
    h, f = MODEL.hidden_size, MODEL.ffn_hidden_size
    shapes = [(3 * h, h), (h, h), (2 * f, h), (h, f)] * MODEL.num_layers
    weights = [torch.randn(shape, dtype=dtype) for shape in shapes]
    flops = 2 * sum(weight.numel() for weight in weights)
    linears = [(of(weight), weight.size(1)) for weight in weights]
    found = []
    for rows in ROWS:
        inputs = {width: torch.randn(rows, width, dtype=dtype) for width in (h, f)}
        seconds = quartile_seconds(lambda x=inputs: [linear(x[width]) for linear, width in linears])
        found.append((rows, rows * flops / seconds))
    return found


def attention(dtype: torch.dtype) -> float:
    length, rows = 80, 16
    heads = MODEL.num_attention_heads
    query, key, value = torch.randn(3, rows, heads, length, MODEL.hidden_size // heads, dtype=dtype)
    seconds = quartile_seconds(
        lambda: torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    )
    return 2 * MODEL.hidden_size * rows * length * length / seconds


def elementwise() -> float:
    """A layer's norms, sums, rotations and SwiGLU over 1280 tokens."""
    from megatron_safe.models.norm import _RMSNorm
    from megatron_safe.models.rope import rotate

    tokens, h, f, heads = 1280, MODEL.hidden_size, MODEL.ffn_hidden_size, MODEL.num_attention_heads
    x, gate_up, weight = torch.randn(tokens, h), torch.randn(tokens, 2 * f), torch.ones(h)
    query, cos = torch.randn(tokens, heads, h // heads), torch.randn(tokens, 1, h // heads)

    def layer():
        for _ in range(2):
            _RMSNorm.apply(x, weight, 1e-5)
            torch.add(x, x)
            rotate(query, cos, cos)
        gate, up = gate_up.chunk(2, -1)
        torch.nn.functional.silu(gate) * (up + 0)
        query.transpose(0, 1).contiguous()

    with torch.no_grad():
        return elementwise_bytes(Sizes.of(MODEL, 1), tokens, tokens, 4) / quartile_seconds(layer)


def copying() -> float:
    source = torch.zeros(2**24)
    target = torch.empty_like(source)
    return 2 * source.nbytes / quartile_seconds(lambda: target.copy_(source))


def update(runtime) -> float:
    from megatron_safe.models.roles import Role

    role = Role("reward_critic", MODEL, runtime, 2048, "fp32", 0, OptimizerConfig(), 1000)
    parameters = sum(parameter.numel() for parameter in role.module.parameters())

    def step():
        role.zero_grad()
        role.step()

    return quartile_seconds(step) / parameters


def overheads(runtime) -> dict[str, float]:
    """From tiny models: forward seconds are step_phase + packs (pack + layers layer_forward), and so on."""
    from megatron_safe.models.packing import Sequences
    from megatron_safe.models.pipeline import forward, forward_backward
    from megatron_safe.models.roles import Role

    rows, columns = 16, 16

    def sequences(lengths_B):
        read_BS = torch.arange(columns) < lengths_B[:, None]
        return Sequences(torch.zeros(rows, columns, dtype=torch.long), lengths_B, read_BS)

    alike, different = sequences(torch.full((rows,), 8)), sequences(1 + torch.arange(rows))

    def loss(scores_N, _):
        total = scores_N.sum()
        return total, {"loss": total}

    def passes(layers: int, packs: int, rows: Sequences = alike) -> tuple[float, float]:
        model = dataclasses.replace(TINY, num_layers=layers)
        role = Role("reward_critic", model, runtime, 64, "fp32", 0, OptimizerConfig(), 1000)
        most = int(rows.lengths_B.sum()) // packs
        return (
            quartile_seconds(lambda: forward(role, rows, most, lambda scores_N, _: scores_N)),
            quartile_seconds(lambda: forward_backward(role, rows, most, loss, ("loss",))),
        )

    (few, few_train), (many, _), (deep, deep_train) = passes(2, 1), passes(2, 8), passes(DEEP, 1)
    layer = max(0.0, (deep - few) / (DEEP - 2))
    pack = max(0.0, (many - few) / 7 - 2 * layer)
    each_by_itself, _ = passes(DEEP, 1, different)
    ticks = {layers: tick(layers, runtime) for layers in (2, DEEP)}
    tick_layer = max(0.0, (ticks[DEEP] - ticks[2]) / (DEEP - 2))
    return {
        "step_phase": max(0.0, few - pack - 2 * layer),
        "pack": pack,
        "layer_forward": layer,
        "layer_backward": max(0.0, (deep_train - few_train) / (DEEP - 2) - layer),
        "attention_call": max(0.0, each_by_itself - deep) / (DEEP * (len(different.lengths_B) - 1)),
        "tick": max(0.0, ticks[2] - 2 * tick_layer),
        "tick_layer": tick_layer,
    }


def tick(layers: int, runtime) -> float:
    """Seconds of the generator's tick: 40 ticks, less those of 8."""
    from megatron_safe.data.batches import TokenBatch
    from megatron_safe.models.roles import Role
    from megatron_safe.rollout.generate import generate

    role = Role("actor", dataclasses.replace(TINY, num_layers=layers), runtime, 64, "fp32", 0)
    lengths_B = torch.full((16,), 4)
    prompts = TokenBatch(torch.zeros(16, 4, dtype=torch.long), lengths_B, lengths_B)

    def rollout(tokens: int) -> float:
        config = RolloutConfig(max_new_tokens=tokens, max_prompt_length=4)
        return quartile_seconds(lambda: generate(role, prompts, torch.arange(16), config, 0, -1, 0))

    return (rollout(40) - rollout(8)) / 32


def link(runtime) -> dict[str, float]:
    """Of an all-reduce between neighbours: 2 (latency + (n - 1) / n bytes / bandwidth). Each follows a product, as in a
    layer, whose seconds are taken off: ranks that have worked do not arrive together, and have to be woken."""
    ranks, calls = runtime.world_size, 16
    if ranks == 1:
        return {"latency": 0.0, "bandwidth": 1e12}
    small, large = torch.zeros(2**10), torch.zeros(2**20)
    rows, weight = torch.randn(128, MODEL.hidden_size), torch.randn(MODEL.hidden_size, MODEL.hidden_size)

    def works(*reduced: torch.Tensor) -> None:
        for _ in range(calls):
            torch.nn.functional.linear(rows, weight)
            for x in reduced:
                dist.all_reduce(x)

    alone, begin, end = (quartile_seconds(lambda x=x: works(*x)) / calls for x in ((), (small,), (large,)))
    share = 2 * (ranks - 1) / ranks
    bandwidth = share * (large.nbytes - small.nbytes) / max(end - begin, 1e-9)
    return {"latency": max(0.0, begin - alone - share * small.nbytes / bandwidth) / 2, "bandwidth": bandwidth}


def measure(processes: int, threads: int, command: str) -> dict:
    torch.set_num_threads(threads)
    with start(ParallelConfig(), 0) as runtime:
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        between = link(runtime)
        processor = platform.processor() or platform.machine()
        found = {
            "name": f"{processor} (CPU), process of {threads} thread(s), {processes} at once",
            "basis": "measured",
            "source": f"{command}, {datetime.date.today()}, {os.cpu_count()} cores, torch {torch.__version__}",
            "device": "cpu",
            "devices_per_node": processes,
            "memory_bytes": memory / processes,
            "reserved_bytes": resident,
            "memory_bandwidth": copying(),
            "elementwise_bandwidth": elementwise(),
            "flops": {"fp32": products(torch.float32)},
            "decode_flops": {"fp32": products(torch.float32, Linear)},
            "attention_flops": {"fp32": attention(torch.float32)},
            "optimizer": update(runtime),
            "overheads": overheads(runtime),
            "inside": between,
            "between": between,
        }
        return found if runtime.is_main else {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    options = parser.parse_args()
    if min(options.processes, options.threads) < 1 or not options.out.parent.is_dir():
        parser.error("expected positive numbers, and a file in an existing folder")
    if options.processes > 1 and "RANK" not in os.environ:
        return subprocess.call(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.processes}",
             *sys.argv],
            env=os.environ | {"OMP_NUM_THREADS": str(options.threads)},
        )  # fmt: skip
    command = f"tools/measure_machine.py --processes {options.processes} --threads {options.threads}"
    found = measure(options.processes, options.threads, command)
    if found:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
