"""Seconds of scoring and training, from the operations of a pass through a model.

Letters as in `memory`. A pass of a pack through a stage is a sum over its operations: matrix products and attention by
FLOPs (Kaplan et al. 2020: 2 a weight and token forward, 4 backward), elementwise work by bytes, collectives by link,
and what does not depend on sizes. Nothing overlaps unless said: the sums err on the slow side.
"""

from dataclasses import dataclass

from megatron_safe.planning.layout import Layout
from megatron_safe.planning.machine import Machine
from megatron_safe.planning.memory import BYTES, Sizes, stage_parameters
from megatron_safe.planning.workload import RoleShape


@dataclass(frozen=True)
class Pack:
    """A micro-batch: T tokens in sequences of `length` on average, N of them read; `lengths`: how many there are."""

    tokens: float
    read: float
    length: float
    lengths: int = 1


def elementwise_bytes(s: Sizes, tokens: float, read: float, itemsize: int) -> float:
    """Read and written by one layer's forward besides matrix products and attention: two norms (2 passes over h in, 1
    out, weight: 5 h each), two residual sums (3 h each), rotation of q and k (7 each), SwiGLU (silu, copy of up,
    product: 7 f), the attention's output laid out again (2 q). A backward pass moves twice as much."""
    before = 8 * s.h + 7 * (s.q + s.kv)
    after = 8 * s.h + 7 * s.f + 2 * s.q
    return itemsize * (before * tokens + after * read)


def layer_seconds(role: RoleShape, pack: Pack, read: float, precision: str, layout: Layout, machine: Machine) -> dict:
    """One layer's forward of a pack on one rank: {"compute", "attention", "communicate", "overhead",
    "calls"}. `read`: N in a
    last layer, else T."""
    s, b = Sizes.of(role.model, layout.tp), BYTES[precision]
    tokens, read = pack.tokens / layout.cp, read / layout.cp
    compute = machine.matmul(tokens, s.h, s.q + 2 * s.kv, precision, b)
    compute += machine.matmul(read, s.q, s.h, precision, b)
    compute += machine.matmul(read, s.h, 2 * s.f, precision, b) + machine.matmul(read, s.f, s.h, precision, b)
    split = layout.tp if layout.sequence_parallel else 1
    # With sequence parallelism the rows of norms and sums are divided; q, kv and f are already.
    rowwise = Sizes(s.h // split, s.q, s.kv, s.f, s.heads, s.head_dim)
    compute += elementwise_bytes(rowwise, tokens, read, b) / machine.elementwise_bandwidth
    # 2 products of 2 q FLOPs a token and earlier token: causal, half of length^2 for each sequence (Dao 2023).
    attention = 2 * s.q * tokens * pack.length / machine.attention_flops[precision]
    communicate = machine.all_reduce(b * s.h * tokens, layout.tp) + machine.all_reduce(b * s.h * read, layout.tp)
    if layout.cp > 1:
        communicate += machine.all_gather(2 * b * s.kv * pack.tokens, layout.cp, layout.tp)
    return {
        "compute": compute, "attention": attention, "communicate": communicate,
        "overhead": machine.overheads.layer_forward, "calls": (pack.lengths - 1) * machine.overheads.attention_call,
    }  # fmt: skip


def head_seconds(role: RoleShape, read: float, precision: str, layout: Layout, machine: Machine) -> float:
    """One matrix product of the language head over N rows, with the elementwise work on its logits (4 passes)."""
    shard, rows, b = role.vocab_rows // layout.tp, read / layout.cp, BYTES[precision]
    product = machine.matmul(rows, role.model.hidden_size, shard, precision, b)
    return product + 4 * b * rows * shard / machine.elementwise_bandwidth


def stage_forward(role: RoleShape, pack: Pack, precision: str, layout: Layout, stage: int, machine: Machine) -> dict:
    """A stage's layers over one pack, the last layer over the rows that are read; without head."""
    layers, last = role.model.num_layers // layout.pp, stage == layout.pp - 1
    whole = layer_seconds(role, pack, pack.tokens, precision, layout, machine)
    total = {part: (layers - last) * value for part, value in whole.items()}
    if last:
        rows = pack.tokens if layout.sequence_parallel else pack.read
        narrow = layer_seconds(role, pack, rows, precision, layout, machine)
        total = {part: value + narrow[part] for part, value in total.items()}
    return total


def hop_seconds(role: RoleShape, tokens: float, precision: str, layout: Layout, machine: Machine) -> float:
    """Hidden states to the next stage; its rank is a block of DP x CP x TP further on (Megatron's order)."""
    if layout.pp == 1:
        return 0.0
    size = BYTES[precision] * role.model.hidden_size * tokens / layout.cp
    return machine.send(size / (layout.tp if layout.sequence_parallel else 1), layout.world // layout.pp)


def pipeline_seconds(stages: list[float], packs: int, virtual: int = 1) -> float:
    """The slowest stage works on every pack; the others' shares of one pack are filling and draining, a v-th of that in
    an interleaved schedule. With equal stages: (m + (p - 1) / v) t (Narayanan et al. 2021, section 2.2)."""
    slowest = max(stages)
    return packs * slowest + (sum(stages) - slowest) / virtual


def forward_seconds(
    role: RoleShape, pack: Pack, packs: int, precision: str, layout: Layout, machine: Machine
) -> float:
    """Scoring: every pack once through the model, with the language head's log-probabilities."""
    stages = []
    for stage in range(layout.pp):
        seconds = sum(stage_forward(role, pack, precision, layout, stage, machine).values()) + machine.overheads.pack
        seconds += hop_seconds(role, pack.tokens, precision, layout, machine)
        if stage == layout.pp - 1 and role.head == "language":
            seconds += head_seconds(role, pack.read, precision, layout, machine)
        stages.append(seconds)
    return machine.overheads.step_phase + pipeline_seconds(stages, packs, layout.virtual)


def backward_stage(
    role: RoleShape, pack: Pack, precision: str, layout: Layout, stage: int, machine: Machine, head_products: int
) -> float:
    """Forward and backward of one pack on one stage: products three times, attention 3.5 times (it is computed again
    in its backward; Dao 2023) and its calls three times, collectives twice, and what `recompute` says once more."""
    once = stage_forward(role, pack, precision, layout, stage, machine)
    layers = role.model.num_layers // layout.pp
    seconds = 3 * once["compute"] + 3.5 * once["attention"] + 2 * once["communicate"] + once["overhead"]
    seconds += 3 * once["calls"]
    seconds += layers * machine.overheads.layer_backward + 2 * machine.overheads.pack
    if layout.recompute == "full":
        seconds += sum(once.values())
    elif layout.recompute == "selective":
        seconds += once["attention"] + once["calls"]
    if stage == layout.pp - 1 and role.head == "language":
        seconds += head_products * head_seconds(role, pack.read, precision, layout, machine)
    return seconds + 2 * hop_seconds(role, pack.tokens, precision, layout, machine)


def optimizer_seconds(role: RoleShape, precision: str, layout: Layout, machine: Machine) -> tuple[float, float]:
    """(gradient reduction, update) of the largest stage. Gradients travel in fp32: an all-reduce, or with a distributed
    optimizer a reduce-scatter and an all-gather of the weights; the update is divided likewise."""
    parameters = max(
        stage_parameters(role.model, role.vocab_rows, role.head, layout, stage, role.outputs)
        for stage in range(layout.pp)
    )
    stride = layout.tp
    if role.distributed:
        reduction = machine.all_gather(4 * parameters, layout.shards, stride)
        reduction += machine.all_gather(BYTES[precision] * parameters, layout.shards, stride)
        return reduction, machine.optimizer * parameters / layout.shards
    return machine.all_reduce(4 * parameters, layout.shards, stride), machine.optimizer * parameters


def passes_seconds(
    role: RoleShape, pack: Pack, packs: int, precision: str, layout: Layout, machine: Machine, head_products: int
) -> float:
    """Forward and backward of all packs through the pipeline.

    head_products: matrix products of the language head, 3 in the PPO loss, 4 where log-probabilities are computed
    first (kernels/linear_logprob.py).
    """
    stages = [
        backward_stage(role, pack, precision, layout, stage, machine, head_products) for stage in range(layout.pp)
    ]
    return machine.overheads.step_phase + pipeline_seconds(stages, packs, layout.virtual)


def update_seconds(
    role: RoleShape, pack: Pack, packs: int, precision: str, layout: Layout, machine: Machine, head_products: int = 3
) -> float:
    """One optimizer step: the passes, the gradients' reduction (hidden behind the last pack's backward where the role
    overlaps it), and the update."""
    seconds = passes_seconds(role, pack, packs, precision, layout, machine, head_products)
    reduction, update = optimizer_seconds(role, precision, layout, machine)
    if role.overlap:
        # Two thirds of a pack's time are backward.
        last = backward_stage(role, pack, precision, layout, 0, machine, head_products)
        reduction = max(0.0, reduction - 2 / 3 * last)
    return seconds + reduction + update
