#!/usr/bin/env python3
"""Times every operation of `kernels/` against what this machine can do, and against other implementations.

    python tools/profile_kernels.py --shapes llama-7b,llama3-8b --against eager,compile,liger --out kernels.json
    python tools/profile_kernels.py --device cpu --against eager

First the ceilings are measured: the bandwidth of a large copy (bytes read plus bytes written) and the rate of a bf16
matrix product. Then each operation: median time of many runs, interleaved with the rivals' (CUDA events; inputs rotated
past the L2 cache), bytes that must move (each input read once, each output written once), and `share_of_ceiling`: the
time in which the ceilings allow those bytes and matrix products, over the time taken. Peak memory is what a run adds to
its inputs, the forward pass included. A speedup is the rival's time over ours; null where the rival failed.

--out FILE.json also writes FILE.png, a roofline. A tp8 shape is one rank's share, without its collective.
"""

import argparse
import datetime
import gc
import json
import os
import platform
import shlex
import shutil
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would write into the table; read as torch is imported

import torch
from kernel_cases import OPERATIONS, SHAPES, Case, Contender, Inputs, rivals_here

RIVALS = ("eager", "compile", "liger", "flash-attn")
CPU_CACHE_BYTES = 2**25  # nominal: torch does not tell


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"profile_kernels: {message}\n")


def names(known):
    def parse(text: str) -> list[str]:
        found = [name.strip() for name in text.split(",") if name.strip()]
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, found {name!r}")
        return list(dict.fromkeys(found))

    return parse


def positive(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"expected positive integers, found {text!r}")
    return numbers


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=names(SHAPES), help="default: the three models; on CPU: laptop")
    parser.add_argument("--tokens", type=positive, help="N, instead of the shapes' own (4096,16384,65536)")
    parser.add_argument("--operations", type=names(OPERATIONS), default=list(OPERATIONS))
    parser.add_argument("--against", type=names(RIVALS), default=["eager", "compile", "liger"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1, cpu")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long each row and contender is repeated")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--trace", type=Path, metavar="FOLDER", help="torch profiler traces of our operations")
    options = parser.parse_args(arguments)
    try:
        options.device = torch.device(options.device)
    except RuntimeError:
        parser.error(f"argument --device: expected cuda or cpu, found {options.device!r}")
    if options.device.type not in ("cuda", "cpu"):
        parser.error(f"argument --device: expected cuda or cpu, found '{options.device}'")
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: there is no CUDA device here")
    if options.device.type == "cuda" and (options.device.index or 0) >= torch.cuda.device_count():
        parser.error(f"argument --device: there are {torch.cuda.device_count()} CUDA devices, found '{options.device}'")
    if options.out and (options.out.suffix != ".json" or not options.out.parent.is_dir()):
        parser.error(f"argument --out: expected a .json file in an existing folder, found '{options.out}'")
    if options.trace and options.trace.exists() and not options.trace.is_dir():
        parser.error(f"argument --trace: expected a folder, found the file '{options.trace}'")
    if not options.seconds >= 0:
        parser.error(f"argument --seconds: expected a number >= 0, found {options.seconds}")
    if not options.shapes:
        options.shapes = ["llama-7b", "llama3-8b", "llama3-70b-tp8"] if options.device.type == "cuda" else ["laptop"]
    return options


def timed(contender: Contender, i: int, device: torch.device) -> float:
    """Seconds of one run."""
    state = contender.prepare(i)
    if device.type != "cuda":
        start = time.perf_counter()
        contender.run(state)
        return time.perf_counter() - start
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(1_000_000)  # half a millisecond, in which the host gets ahead: launches must not be timed
    start.record()
    contender.run(state)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def peak_bytes(contender: Contender, device: torch.device) -> int:
    """The most memory one run holds beyond what was allocated before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        contender.run(contender.prepare(0))
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        contender.run(contender.prepare(0))
    changes = [(e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for _, change in sorted(changes, key=lambda event: event[0]):
        held += change
        most = max(most, held)
    return most


def measure(contenders: dict[str, Contender], device: torch.device, seconds: float) -> tuple[dict[str, float], list]:
    """Median seconds of every contender that works, and a line about each that does not."""
    times: dict[str, list[float]] = {}
    lines = []
    for name, contender in contenders.items():
        try:
            for i in range(2 if device.type == "cuda" else 1):
                timed(contender, i, device)
            times[name] = []
        except Exception as error:  # a rival may fail in any way of its own; ours may not
            if name == "ours":
                raise
            lines.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:100]}, skipped")
    started = time.perf_counter()
    for i in range(100):
        if i >= 3 and time.perf_counter() - started > seconds * len(times):
            break
        for name in times:
            times[name].append(timed(contenders[name], i, device))
    return {name: statistics.median(found) for name, found in times.items()}, lines


def ceilings(device: torch.device, seconds: float) -> tuple[float, float]:
    """Copy bandwidth in bytes/s (read plus written), and the rate of a bf16 matrix product in flop/s."""
    cuda = device.type == "cuda"
    source = torch.randint(127, (2**30 if cuda else 2**27,), dtype=torch.int8, device=device)
    target, size = torch.empty_like(source), 8192 if cuda else 1024
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    found, _ = measure({
        "copy": Contender(lambda i: None, lambda _: target.copy_(source)),
        "matmul": Contender(lambda i: None, lambda _: a @ b),
    }, device, seconds)  # fmt: skip
    return 2 * source.nbytes / found["copy"], 2 * size**3 / found["matmul"]


def row(case: Case, device: torch.device, seconds: float, bandwidth: float, rate: float) -> tuple[dict, list[str]]:
    medians, lines = measure(case.contenders, device, seconds)
    took = medians["ours"]
    floor = max(case.bytes / bandwidth, case.flops / rate if case.matmul else 0.0)
    return {
        "name": case.name,
        "shape": case.shape,
        "ms": took * 1e3,
        "bytes": case.bytes,
        "flops": case.flops,
        "gb_per_s": case.bytes / took / 1e9,
        "share_of_ceiling": floor / took,
        "peak_bytes": peak_bytes(case.contenders["ours"], device),
        "speedup": {rival: medians[rival] / took if rival in medians else None
                    for rival in case.contenders if rival != "ours"},
        "rival_peak_bytes": {rival: peak_bytes(case.contenders[rival], device) for rival in medians if rival != "ours"},
    }, lines  # fmt: skip


def shown(found: dict) -> str:
    rivals = "  ".join(
        f"{rival} x{x:.2f} ({found['rival_peak_bytes'][rival] / 2**20:.1f} MiB)" if x else f"{rival} -"
        for rival, x in found["speedup"].items()
    )
    return (
        f"{found['name']:40} {found['shape']:34} {found['ms']:10.4f} ms {found['bytes'] / 1e6:10.2f} MB "
        f"{found['gb_per_s']:9.2f} GB/s {found['share_of_ceiling']:7.1%} {found['peak_bytes'] / 2**20:9.1f} MiB  "
        + rivals
    )


def draw_roofline(path: Path, device: str, rows: list[dict], bandwidth: float, rate: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6))
    intensities = [row["flops"] / row["bytes"] for row in rows]
    ends = [min([0.1, *intensities]) / 2, max([2 * rate / bandwidth, *intensities]) * 2]
    corner = rate / bandwidth
    axes.loglog([ends[0], corner, ends[1]], [ends[0] * bandwidth / 1e9, rate / 1e9, rate / 1e9], "k-",
                label=f"copy {bandwidth / 1e9:.0f} GB/s, bf16 matmul {rate / 1e12:.1f} TFLOP/s")  # fmt: skip
    for index, name in enumerate(dict.fromkeys(row["name"] for row in rows)):
        points = [(i, row["flops"] / row["ms"] / 1e6) for i, row in zip(intensities, rows, strict=True)
                  if row["name"] == name]  # fmt: skip
        axes.loglog(*zip(*points, strict=True), "os^Dv<>p*h"[index % 10], label=name)
    axes.set(xlabel="operations per byte that must move", ylabel="Gop/s", title=f"kernels on {device}")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def trace(case: Case, folder: Path) -> None:
    ours = case.contenders["ours"]
    with torch.profiler.profile() as profile:
        for i in range(3):
            ours.run(ours.prepare(i))
    folder.mkdir(parents=True, exist_ok=True)
    profile.export_chrome_trace(str(folder / ("-".join(f"{case.name} {case.shape}".split()) + ".json")))


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    device = options.device
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    name = torch.cuda.get_device_name(device) if cuda else f"{platform.processor() or platform.machine()} (CPU)"
    cache = torch.cuda.get_device_properties(device).L2_cache_size if cuda else CPU_CACHE_BYTES
    threads = "" if cuda else f", {torch.get_num_threads()} threads"
    bandwidth, rate = ceilings(device, options.seconds)
    print(f"{name}{threads}, torch {torch.__version__}: copy {bandwidth / 1e9:.1f} GB/s, "
          f"bf16 matmul {rate / 1e12:.2f} TFLOP/s")  # fmt: skip
    rivals, lines = rivals_here(options.against)
    for line in lines:
        print(line)

    rows: list[dict] = []
    for operation in options.operations:
        for shape in (SHAPES[name] for name in options.shapes):
            if options.tokens:
                shape = shape.with_tokens(options.tokens)
            try:
                for case in OPERATIONS[operation](operation, shape, Inputs(device, cache), rivals):
                    found, lines = row(case, device, options.seconds, bandwidth, rate)
                    print(shown(found), *lines, sep="\n    ", flush=True)
                    rows.append(found)
                    if options.trace:
                        trace(case, options.trace)
            except (ImportError, AttributeError) as error:
                print(f"{operation}: not there ({error}), skipped")
            except torch.OutOfMemoryError:
                print(f"{operation} {shape.name}: out of memory, skipped")
    if shutil.which("ncu") and cuda:
        print("deeper: ncu --set full python tools/profile_kernels.py --operations NAME --shapes NAME --against ''")
    if options.out:
        record = {
            "device": name,
            "date": datetime.date.today().isoformat(),
            "command": shlex.join(["python", "tools/profile_kernels.py", *arguments]),
            "torch": torch.__version__,
            "copy_gb_per_s": bandwidth / 1e9,
            "matmul_tflop_per_s": rate / 1e12,
            "operations": rows,
        }
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if rows:
            draw_roofline(options.out.with_suffix(".png"), name, rows, bandwidth, rate)
    return 0


if __name__ == "__main__":
    sys.exit(main())
