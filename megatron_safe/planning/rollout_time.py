"""Seconds of a rollout: the generator's slots and queue, played through with expected answer lengths.

Letters as in `memory`; C samples in a group's slots, R rows of a tick.
"""

import dataclasses
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_safe.planning.layout import Layout
from megatron_safe.planning.machine import Machine
from megatron_safe.planning.memory import BYTES, Sizes
from megatron_safe.planning.step_time import Pack, hop_seconds, layer_seconds
from megatron_safe.planning.workload import RoleShape
from megatron_safe.rollout.cache import STEP
from megatron_safe.rollout.slots import PREFILL_ROWS

GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Tick:
    """samples: decoded; prompt_rows: computed with them; positions: cells of the cache that the samples look at, added
    up; longest: of them."""

    samples: int
    prompt_rows: float
    positions: float
    longest: float


def answer_lengths(samples: int, mean: float, most: int) -> list[int]:
    """Lengths of `samples` answers: all `most` where that is the mean, else geometric and cut at `most`.

    They are the distribution's own quantiles, in an order without clumps (multiples of the golden ratio), so that a
    plan needs no luck. The uncut geometric's mean is sought by bisection.
    """
    if mean >= most:
        return [most] * samples
    low, high = 1.0, 1e9
    for _ in range(100):
        middle = math.sqrt(low * high)
        # Mean of min(X, most): the sum of P(X > t) over t < most.
        stop = 1 / middle
        found = (1 - (1 - stop) ** most) / stop
        low, high = (middle, high) if found < mean else (low, middle)
    if low <= 1 + 1e-9:
        return [1] * samples
    scale = math.log1p(-1 / low)
    return [min(most, 1 + int(math.log1p(-((0.5 + i * GOLDEN) % 1.0)) / scale)) for i in range(samples)]


def ticks(lengths: list[int], slots: int, prompt: float) -> Iterator[Tick]:
    """What a generator with `slots` slots computes until the queue is empty and all have ended (rollout/slots.py):
    a free slot takes the next sample, whose prompt's rows but the last come along."""
    waiting, left, ages = deque(lengths), [], []
    most_new = max(1, int(PREFILL_ROWS // max(1.0, prompt - 1)))
    while waiting or left:
        new = min(slots - len(left), len(waiting), most_new)
        left += [waiting.popleft() for _ in range(new)]
        ages += [0] * new
        positions = len(left) * prompt + sum(ages)
        yield Tick(len(left), new * max(0.0, prompt - 1), positions, prompt + max(ages))
        still = [i for i, tokens in enumerate(left) if tokens > 1]
        left, ages = [left[i] - 1 for i in still], [ages[i] + 1 for i in still]


def stage_seconds(
    role: RoleShape, tick: Tick, prompt: float, precision: str, layout: Layout, stage: int, machine: Machine
) -> float:
    """One tick on one stage: products, roofline with the weights read once; the cache read; prompts' own attention;
    two all-reduces a layer; on the last stage logits, sampling (8 passes over fp32 logits)."""
    machine = dataclasses.replace(machine, flops=machine.decode_flops)
    s, b = Sizes.of(role.model, layout.tp), BYTES[precision]
    layers, last = role.model.num_layers // layout.pp, stage == layout.pp - 1
    rows, overheads = tick.samples + tick.prompt_rows, machine.overheads
    whole = layer_seconds(role, Pack(rows, rows, 0.0), rows, precision, layout, machine)
    per_layer = whole["compute"] + whole["communicate"] + overheads.tick_layer
    attention = 2 * s.q * tick.prompt_rows * prompt / machine.attention_flops[precision]
    # The CPU path reads whole slots, which are as long as the longest sample needs.
    cells = tick.positions if machine.device == "gpu" else tick.samples * STEP * math.ceil(tick.longest / STEP)
    attention += 2 * b * s.kv * cells / machine.memory_bandwidth
    seconds = layers * (per_layer + attention) + overheads.tick
    if last:
        narrow = layer_seconds(role, Pack(rows, rows, 0.0), tick.samples, precision, layout, machine)
        seconds -= whole["compute"] - narrow["compute"] + whole["communicate"] - narrow["communicate"]
        shard = role.vocab_rows // layout.tp
        seconds += machine.matmul(tick.samples, s.h, shard, precision, b)
        seconds += 8 * 4 * tick.samples * shard / machine.elementwise_bandwidth
        seconds += machine.all_gather(16 * tick.samples * layout.tp, layout.tp)
    if stage == 0:
        seconds += machine.all_reduce(b * s.h * rows, layout.tp)
    return seconds


def generate_seconds(
    role: RoleShape, lengths: list[int], slots: int, prompt: float, precision: str, layout: Layout, machine: Machine
) -> float:
    """Of a rollout of `lengths` on one replica with `slots` slots in all.

    With p stages, p groups of slots / p rotate: a round (one tick of each group) takes the slowest stage p ticks, and
    no less than one group takes through all stages and back.
    """
    groups, seconds = layout.pp, machine.overheads.step_phase
    share = lengths[:: groups] if groups > 1 else lengths
    for tick in ticks(share, max(1, math.ceil(slots / groups)), prompt):
        stages = [
            stage_seconds(role, tick, prompt, precision, layout, stage, machine) for stage in range(layout.pp)
        ]
        rows = tick.samples + tick.prompt_rows
        hops = layout.pp * hop_seconds(role, rows, precision, layout, machine)
        seconds += max(groups * max(stages), sum(stages) + hops)
    return seconds
