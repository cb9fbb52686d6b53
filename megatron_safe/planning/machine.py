"""What a machine can do, as constants in a JSON file, and the time of the operations that follow from them.

Units: bytes, seconds, floating-point operations (a multiply-add is two), per second. tools/measure_machine.py writes
such a file for a CPU; docs/benchmarks/machines/h100.json is a data sheet with efficiencies assumed.
"""

import bisect
import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_safe.errors import UserError
from megatron_safe.planning.memory import Device


@dataclass(frozen=True)
class Link:
    """Between ranks: seconds before the first byte, and bytes/s that one rank sends."""

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Overheads:
    """Seconds that do not depend on sizes: launches, Python, schedules.

    step_phase: a role's pass over its packs (packing, schedule), pack: one pack through a model besides its layers,
    layer_forward, layer_backward: one layer of a pack; attention_call: the attention of sequences of another length in
    it, where each length takes a call of its own (CPU); tick: one tick of the generator besides its layers (slots,
    sampling), tick_layer: one layer of a tick.
    """

    step_phase: float
    pack: float
    layer_forward: float
    layer_backward: float
    attention_call: float
    tick: float
    tick_layer: float


@dataclass(frozen=True)
class Machine:
    """One kind of device and its links.

    basis: whether the constants were measured on such a machine, or come from a data sheet. flops: by dtype, pairs of
    (rows of a matrix product, FLOP/s reached), rows ascending; decode_flops: likewise of the generator, whose
    products read other copies of the weights on a CPU. attention_flops: by dtype, reached by causal attention.
    memory_bandwidth: at which weights and cache are read. elementwise_bandwidth: of norms, activations and the like,
    with the traffic of `step_time.elementwise_bytes`. optimizer: seconds a parameter for an optimizer step (norm, clip,
    AdamW, zeroing), without collectives. reserved_bytes: of memory_bytes, what no tensor gets (context, communication
    buffers, fragmentation). inside, between: links within and across nodes.
    """

    name: str
    basis: Literal["measured", "data sheet"]
    source: str
    device: Device
    devices_per_node: int
    memory_bytes: float
    reserved_bytes: float
    memory_bandwidth: float
    elementwise_bandwidth: float
    flops: dict[str, list[tuple[float, float]]]
    decode_flops: dict[str, list[tuple[float, float]]]
    attention_flops: dict[str, float]
    optimizer: float
    overheads: Overheads
    inside: Link
    between: Link

    def matmul(self, rows: float, inner: float, columns: float, precision: str, itemsize: int) -> float:
        """[rows, inner] x [inner, columns]: the larger of arithmetic and reading the weight (roofline, Williams et al.
        2009)."""
        if rows <= 0:
            return 0.0
        weight = inner * columns
        return max(2 * rows * weight / self.rate(rows, precision), itemsize * weight / self.memory_bandwidth)

    def rate(self, rows: float, precision: str) -> float:
        """FLOP/s at so many rows, between two known ones on a straight line of logarithms; constant beyond the last, in
        proportion to the rows below the first (a kernel's smallest tile takes what it takes)."""
        known = self.flops[precision]
        place = bisect.bisect_right([r for r, _ in known], rows)
        if place == 0:
            return known[0][1] * rows / known[0][0]
        if place == len(known):
            return known[-1][1]
        (low, slow), (high, fast) = known[place - 1], known[place]
        share = math.log(rows / low) / math.log(high / low)
        return slow * (fast / slow) ** share

    def link(self, ranks: int, stride: int) -> Link:
        """The slowest link of a group of `ranks` ranks that are `stride` apart."""
        return self.inside if (ranks - 1) * stride < self.devices_per_node else self.between

    def all_reduce(self, size: float, ranks: int, stride: int = 1) -> float:
        """Of `size` bytes on each rank: 2 (n - 1) / n of them over the link, as in a ring (Patarasuk and Yuan 2009)."""
        return 2 * self.all_gather(size, ranks, stride)

    def all_gather(self, size: float, ranks: int, stride: int = 1) -> float:
        """Or reduce-scatter, of `size` bytes altogether: (n - 1) / n of them over the link."""
        if ranks == 1:
            return 0.0
        link = self.link(ranks, stride)
        return link.latency + (ranks - 1) / ranks * size / link.bandwidth

    def send(self, size: float, stride: int) -> float:
        """Of `size` bytes to a rank `stride` further on."""
        link = self.link(2, stride)
        return link.latency + size / link.bandwidth


def load_machine(path: str) -> Machine:
    """Raises UserError, naming file and field, where the file is not a machine's."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--machine {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--machine {path}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"--machine {path}: expected an object, found {type(found).__name__}")
    names = {field.name for field in dataclasses.fields(Machine)}
    _same_keys(path, "", found, names)
    for name, kind in (("inside", Link), ("between", Link), ("overheads", Overheads)):
        parts = {field.name for field in dataclasses.fields(kind)}
        if not isinstance(found[name], dict):
            raise UserError(f"--machine {path}: {name}: expected an object with {', '.join(sorted(parts))}")
        _same_keys(path, f"{name}.", found[name], parts)
        for part, value in found[name].items():
            # A link may have no latency, but no bandwidth is none.
            _check(path, f"{name}.{part}", value, allow_zero=part != "bandwidth")
        found[name] = kind(**found[name])
    for name in ("devices_per_node", "memory_bytes", "memory_bandwidth", "elementwise_bandwidth", "optimizer"):
        _check(path, name, found[name])
    _check(path, "reserved_bytes", found["reserved_bytes"], allow_zero=True)
    for name, choices in (("basis", ("measured", "data sheet")), ("device", ("cpu", "gpu"))):
        if found[name] not in choices:
            raise UserError(f"--machine {path}: {name}: expected {' or '.join(choices)}, found {found[name]!r}")
    for name in ("flops", "decode_flops"):
        for precision, known in found[name].items():
            rows = [pair[0] for pair in known]
            if not rows or rows != sorted(set(rows)) or min(rows) <= 0 or min(pair[1] for pair in known) <= 0:
                raise UserError(f"--machine {path}: {name}.{precision}: expected [rows, FLOP/s] pairs, rows ascending")
    return Machine(**found)


def _same_keys(path: str, prefix: str, found: dict, names: set[str]) -> None:
    for name in sorted(names ^ found.keys()):
        what = "missing" if name in names else "no such field"
        raise UserError(f"--machine {path}: {prefix}{name}: {what}")


def _check(path: str, name: str, value, allow_zero: bool = False) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < 0 or (value == 0 and not allow_zero):
        raise UserError(f"--machine {path}: {name}: expected a number above 0, found {value!r}")
