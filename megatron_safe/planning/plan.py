"""Memory and time of a workload in a layout on a machine: the formulas of `memory` and `step_time` added up."""

import dataclasses
import math
from dataclasses import dataclass

from megatron_safe.planning import memory
from megatron_safe.planning.layout import Layout
from megatron_safe.planning.machine import Machine
from megatron_safe.planning.rollout_time import answer_lengths, generate_seconds
from megatron_safe.planning.step_time import Pack, forward_seconds, passes_seconds, update_seconds
from megatron_safe.planning.workload import RoleShape, Workload
from megatron_safe.rollout.generate import CPU_SLOTS, MEMORY_SHARE
from megatron_safe.rollout.slots import PREFILL_ROWS

Seconds = dict[str, dict[str, float]]
"""phase -> part -> seconds of a step."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each rank of one pipeline stage.

    roles: name -> part (weights, gradients, optimizer) -> bytes, there all the time. phases: name -> part -> bytes
    that come on top in that phase.
    """

    roles: dict[str, dict[str, float]]
    phases: dict[str, dict[str, float]]

    @property
    def resident(self) -> float:
        return sum(sum(parts.values()) for parts in self.roles.values())

    @property
    def peaks(self) -> dict[str, float]:
        return {name: self.resident + sum(parts.values()) for name, parts in self.phases.items()}


@dataclass(frozen=True)
class MemoryPlan:
    """Of every pipeline stage; what tensors may take on a device; and the samples decoded at once on a data-parallel
    rank (0: the cache does not fit)."""

    stages: list[StageMemory]
    capacity: float
    slots: int

    @property
    def worst(self) -> float:
        return max(max(stage.peaks.values()) for stage in self.stages)

    @property
    def fits(self) -> bool:
        return self.slots > 0 and self.worst <= self.capacity


def memory_plan(work: Workload, layout: Layout, machine: Machine) -> MemoryPlan:
    stages = [_resident_and_passes(work, layout, stage, machine) for stage in range(layout.pp)]
    capacity = machine.memory_bytes - machine.reserved_bytes
    slots = 1
    if work.generates:
        slots = slots_that_fit(work, layout, stages, capacity, machine)
        for number, stage in enumerate(stages):
            stage.phases["generate"] = _generate_bytes(work, layout, number, slots, machine)
    return MemoryPlan(stages, capacity, slots)


def pack_of(
    role: RoleShape, rows: float, answer: float, length: float, most: int, layout: Layout, spread: int = 0
) -> tuple[Pack, int]:
    """(a pack, how many) of `rows` rows on a rank, filled to `most` tokens; where answers are read, N are theirs.

    spread: the longest answer, where lengths differ and each length counts (a CPU's attention).
    """
    tokens = rows * length
    packs = layout.packs(tokens, most)
    read = rows if role.judges else rows * answer
    lengths = len(set(answer_lengths(math.ceil(rows / packs), answer, spread))) if spread else 1
    return Pack(tokens / packs, read / packs, length, lengths), packs


def largest_pack(work: Workload, role: RoleShape, rows: float, most: int, layout: Layout) -> tuple[Pack, int]:
    """As `pack_of` with every row as long as it may be; a row longer than `most` has a pack of its own."""
    pack, packs = pack_of(role, rows, work.max_answer, work.max_length, most, layout)
    if pack.tokens >= work.max_length:
        return pack, packs
    return Pack(work.max_length, 1 if role.judges else work.max_answer, work.max_length), packs


def _resident_and_passes(work: Workload, layout: Layout, stage: int, machine: Machine) -> StageMemory:
    precision, device = work.precision, machine.device
    roles, phases = {}, {}
    rows = work.rows / layout.dp
    for role in work.roles:
        count = memory.stage_parameters(role.model, role.vocab_rows, role.head, layout, stage, role.outputs)
        roles[role.name] = {"weights": memory.weight_bytes(count, precision), "gradients": 0, "optimizer": 0}
        if role.trained:
            shards = layout.shards if role.distributed else 1
            roles[role.name]["gradients"] = memory.gradient_bytes(count)
            roles[role.name]["optimizer"] = memory.optimizer_bytes(count, precision, shards)
        if role in work.scored:
            pack, _ = largest_pack(work, role, rows, work.score_pack_tokens, layout)
            for parts in scoring_bytes(role, pack, precision, layout, stage, device):
                _keep_larger(phases, "score", parts)
        if role.trained:
            pack, packs = largest_pack(work, role, work.update_rows / layout.dp, work.pack_tokens, layout)
            for parts in training_bytes(role, pack, packs, precision, layout, stage, device):
                _keep_larger(phases, "train", parts)
    return StageMemory(roles, phases)


def scoring_bytes(
    role: RoleShape, pack: Pack, precision: str, layout: Layout, stage: int, device: memory.Device
) -> list[dict[str, float]]:
    """What there is one after the other: a layer at work, and the language head with the rows it reads."""
    times = [{"activations": memory.working_bytes(role.model, pack.tokens, precision, layout)}]
    if stage == layout.pp - 1 and role.head == "language":
        rows = memory.BYTES[precision] * role.model.hidden_size * pack.read / layout.cp
        logits = memory.head_bytes(role.model, role.vocab_rows, pack.read, precision, layout, device, False)
        times.append({"activations": 3 * rows, "logits": logits})
    return times


def training_bytes(
    role: RoleShape, pack: Pack, packs: int, precision: str, layout: Layout, stage: int, device: memory.Device
) -> list[dict[str, float]]:
    """What there is one after the other: with the activations of the packs in flight first the loss, then a layer's
    backward, for which a layer's activations may have been made anew."""
    last = stage == layout.pp - 1
    of_pack = memory.stage_activation_bytes(role.model, pack.tokens, pack.read, precision, layout, stage, device)
    of_pack += memory.boundary_bytes(role.model, pack.tokens, precision, layout, stage)
    kept = layout.in_flight(stage, packs) * of_pack
    narrow = last and not layout.sequence_parallel and layout.recompute == "none"
    rows = pack.read if narrow else pack.tokens
    backward = memory.backward_bytes(role.model, rows, precision, layout)
    if layout.recompute != "none":
        args = role.model, pack.tokens, pack.tokens, precision
        backward += memory.layer_activation_bytes(*args, dataclasses.replace(layout, recompute="none"), device)
        backward -= memory.layer_activation_bytes(*args, layout, device)
    times = [{"activations": kept + backward}]
    if last and role.head == "language":
        logits = memory.head_bytes(role.model, role.vocab_rows, pack.read, precision, layout, device, True)
        times.append({"activations": kept, "logits": logits})
    return times


def _keep_larger(phases: dict, name: str, parts: dict[str, float]) -> None:
    """Roles take their turns: a phase's peak is the largest one's."""
    if sum(parts.values()) > sum(phases.get(name, {}).values()):
        phases[name] = parts


def slots_that_fit(
    work: Workload, layout: Layout, stages: list[StageMemory], capacity: float, machine: Machine
) -> int:
    """As the generator decides: 128 on a CPU, a share of the free memory on a GPU, at most all."""
    samples = math.ceil(work.rows / layout.dp)
    if machine.device == "cpu":
        return min(CPU_SLOTS, samples)
    per_slot = memory.cache_bytes_per_slot(work.role("actor").model, work.max_length, work.precision, layout)
    free = min(capacity - stage.resident for stage in stages)
    fit = min(int(free * MEMORY_SHARE / per_slot), samples)
    while fit > 0:
        bytes_of = [_generate_bytes(work, layout, stage, fit, machine) for stage in range(layout.pp)]
        if all(stage.resident + sum(parts.values()) <= capacity for stage, parts in zip(stages, bytes_of, strict=True)):
            break
        fit = fit * 9 // 10
    return max(0, fit)


def _generate_bytes(work: Workload, layout: Layout, stage: int, slots: int, machine: Machine) -> dict[str, float]:
    """Cache of all groups' slots; one tick's rows; logits with the sampler's two fp32 copies."""
    role, precision = work.role("actor"), work.precision
    samples = math.ceil(slots / layout.pp)
    rows = min(PREFILL_ROWS, samples * work.max_prompt) + samples
    without_context = Layout(layout.tp, layout.pp, layout.dp)
    parts = {
        "cache": slots * memory.cache_bytes_per_slot(role.model, work.max_length, precision, layout),
        "activations": memory.working_bytes(role.model, rows, precision, without_context),
    }
    if stage == layout.pp - 1:
        parts["logits"] = samples * (role.vocab_rows // layout.tp) * (memory.BYTES[precision] + 8)
    if machine.device == "cpu":
        parts["weights again"] = memory.decoder_copy_bytes(role.model, role.vocab_rows, precision, layout, stage)
    return parts


def step_seconds(work: Workload, layout: Layout, slots: int, machine: Machine) -> Seconds:
    """phase -> part -> seconds: the rollout; each model's scoring; each learner's updates."""
    precision, rows = work.precision, work.rows / layout.dp
    spread = work.max_answer if machine.device == "cpu" else 0
    seconds: Seconds = {}
    if work.generates:
        lengths = answer_lengths(math.ceil(rows), work.answer, work.max_answer)
        actor = work.role("actor")
        seconds["generate"] = {
            "actor": generate_seconds(actor, lengths, slots, work.prompt, precision, layout, machine)
        }
        seconds["score"] = {}
        for role in work.scored:
            pack, packs = pack_of(role, rows, work.answer, work.length, work.score_pack_tokens, layout, spread)
            seconds["score"][role.name] = forward_seconds(role, pack, packs, precision, layout, machine)
    seconds["train"] = {}
    for role in work.learners:
        rows = work.update_rows / layout.dp
        args = work.answer, work.length, work.pack_tokens, layout, spread
        products = 4 if work.stage == "sft" else 3
        once = update_seconds(role, *pack_of(role, rows, *args), precision, layout, machine, products)
        if role.name == "actor" and work.demonstrations:
            pack, packs = pack_of(role, work.demonstrations / layout.dp, *args)
            once += passes_seconds(role, pack, packs, precision, layout, machine, 4)
        seconds["train"][role.name] = work.updates * once
    return seconds
