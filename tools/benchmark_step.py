#!/usr/bin/env python3
"""Times a PPO-Lag step of six random models on the CPU, ours against Hugging Face's `generate` and plain PyTorch.

    python tools/benchmark_step.py --workload both --out step.json
    python tools/benchmark_step.py --workload B --layouts one,pp2 --repeats 3 --trace traces

Workload A: 32 prompts of 16 tokens, every answer exactly 64 tokens. Workload B: 256 prompts, answer lengths geometric
(mean 24, cap 64). The rival is tools/rival_step.py (needs `transformers`; left out where that is missing). One process
has two threads, a layout of two processes (tp2, pp2, dp2) one thread each.

Every side is a program of its own that waits for its turn: the sides alternate step by step, and each one's peak memory
is its own. Seconds are medians over the repeats, after a warm-up; a speedup is the rival's seconds over ours; tokens/s
counts answer tokens. Peak memory is what the process held at most beyond what it held after its imports.

How the answers get their lengths: random models do not end them. Each sample has a limit, drawn once per workload, and
ends there on both sides; the rest is as with an EOS. Ours is told by `generate(max_new_tokens_B=...)`, which must use
it as it would use an EOS: to end a sample, never to plan which one goes first. The rival has a StoppingCriteria.
"""

import argparse
import contextlib
import datetime
import importlib.util
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from step_side import LAYOUTS, PHASES, REPORT, WORKLOADS


class SideFailed(Exception):
    """A side's program ended where it should have answered."""


class Side:
    """A running tools/step_side.py."""

    def __init__(self, workload: str, name: str):
        self.name = name
        processes = math.prod(LAYOUTS.get(name, (1,)))
        program = [str(Path(__file__).with_name("step_side.py")), workload, name]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, *(launcher if processes > 1 else []), *program],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1" if processes > 1 else "2", "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip

    def answer(self) -> dict:
        for line in self._process.stdout:
            if line.startswith(REPORT):
                return json.loads(line.removeprefix(REPORT))
        self._errors.seek(0)
        raise SideFailed(f"{self.name} failed:\n{self._errors.read()[-4000:]}")

    def ask(self, command: str) -> dict:
        try:
            print(command, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            pass  # `answer` says what it died of
        return self.answer()

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()


def measure(name: str, sides: list[str], repeats: int, trace: Path | None) -> dict:
    """Alternating steps of all sides on one workload, and what follows from their medians."""
    runs: dict[str, list[dict]] = {side: [] for side in sides}
    expected = int(WORKLOADS[name].limits_B().sum())
    with contextlib.ExitStack() as stack:
        running = {side: stack.enter_context(contextlib.closing(Side(name, side))) for side in sides}
        for side in running.values():
            side.answer()
        for repeat in range(repeats + 1):
            for side in sides:
                found = running[side].ask(f"step {repeat}")
                assert found["tokens"] == expected, (side, found["tokens"], expected)
                runs[side].append(found)
            shown = ", ".join(f"{side} {found[-1]['seconds']['step']:.2f} s" for side, found in runs.items())
            print(f"{name} {f'repeat {repeat}/{repeats}' if repeat else 'warm-up'}: {shown}", flush=True)
        if trace:
            trace.mkdir(parents=True, exist_ok=True)
            for side in sides:
                running[side].ask(f"trace {(trace / f'{name}-{side}.json').resolve()}")
    return summary(name, expected, {side: found[1:] for side, found in runs.items()})


def summary(name: str, tokens: int, runs: dict[str, list[dict]]) -> dict:
    """A workload's part of the record; `runs`: side -> the answers to its steps. Ratios without a rival are None."""
    workload = WORKLOADS[name]
    sides = {}
    for side, found in runs.items():
        seconds = {phase: statistics.median(run["seconds"][phase] for run in found) for phase in (*PHASES, "step")}
        sides["ours" if side == "one" else side] = {
            "seconds": seconds,
            "tokens_per_second": {phase: tokens / seconds[phase] for phase in ("generate", "step")},
            "peak_bytes": found[-1]["peak_bytes"],  # a peak since the start; of rank 0 where there are more
            "step_seconds_of_each_repeat": [run["seconds"]["step"] for run in found],
        }
    ours, rival = sides["ours"], sides.get("rival")

    def speedup(phase: str) -> float | None:
        return rival and rival["seconds"][phase] / ours["seconds"][phase]

    layouts = {
        layout: sides[layout] | {
            f"{label}_of_one_process": sides[layout]["tokens_per_second"][phase] / ours["tokens_per_second"][phase]
            for phase, label in (("generate", "generation"), ("step", "step"))
        }
        for layout in sides if layout not in ("ours", "rival")
    }  # fmt: skip
    return {
        "prompts": workload.prompts,
        "answer_tokens": tokens,
        "repeats": len(runs["one"]),
        "generation_speedup": speedup("generate"),
        "score_speedup": speedup("score"),
        "train_speedup": speedup("train"),
        "step_speedup": speedup("step"),
        "memory_ratio": ours["peak_bytes"] / rival["peak_bytes"] if rival and rival["peak_bytes"] else None,
        "ours": ours,
        "rival": rival,
        "layouts": layouts,
    }


def table(name: str, found: dict) -> str:
    lines = [f"Workload {name}: {found['prompts']} prompts, {found['answer_tokens']} answer tokens"]
    lines.append(f"{'':8}" + "".join(f"{phase + ' s':>12}" for phase in (*PHASES, "step"))
                 + f"{'gen. tok/s':>12}{'step tok/s':>12}{'peak MiB':>10}")  # fmt: skip
    for side, row in {"ours": found["ours"], "rival": found["rival"], **found["layouts"]}.items():
        if row is None:
            continue
        line = f"{side:8}" + "".join(f"{row['seconds'][phase]:12.3f}" for phase in (*PHASES, "step"))
        line += "".join(f"{row['tokens_per_second'][phase]:12.0f}" for phase in ("generate", "step"))
        line += f"{row['peak_bytes'] / 2**20:10.0f}" if row["peak_bytes"] else f"{'-':>10}"
        if side in found["layouts"]:
            line += f"  x{row['generation_of_one_process']:.2f} generation, x{row['step_of_one_process']:.2f} step"
        lines.append(line)
    if found["rival"]:
        line = f"against the rival: generation x{found['generation_speedup']:.2f}, step x{found['step_speedup']:.2f}"
        lines.append(line + (f", memory x{found['memory_ratio']:.2f}" if found["memory_ratio"] else ""))
    return "\n".join(lines)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"benchmark_step: {message}\n")


def layouts(text: str) -> list[str]:
    found = [name.strip() for name in text.split(",") if name.strip()]
    for name in found:
        if name not in LAYOUTS:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(LAYOUTS)}, found {name!r}")
    return list(dict.fromkeys(["one", *found]))  # the others are measured against it


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=[*WORKLOADS, "both"], default="both", help="both: A and B")
    parser.add_argument("--layouts", type=layouts, default=list(LAYOUTS), help="some of one,tp2,pp2,dp2 (one: always)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--trace", type=Path, metavar="FOLDER", help="a torch profiler trace of one step of each side")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"argument --repeats: expected a positive integer, found {options.repeats}")
    if options.out and (options.out.suffix != ".json" or not options.out.parent.is_dir()):
        parser.error(f"argument --out: expected a .json file in an existing folder, found '{options.out}'")
    if options.trace and options.trace.exists() and not options.trace.is_dir():
        parser.error(f"argument --trace: expected a folder, found the file '{options.trace}'")
    return options


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    sides = list(options.layouts)
    if importlib.util.find_spec("transformers"):
        sides.insert(1, "rival")  # next to what it is compared with
    else:
        print("transformers: not installed, the rival is left out and there are no speedups")
    record = {
        "device": f"{platform.processor() or platform.machine()} (CPU), {os.cpu_count()} cores",
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "tools/benchmark_step.py", *arguments]),
        "torch": torch.__version__,
        "workloads": {},
    }
    for name in ("A", "B") if options.workload == "both" else (options.workload,):
        try:
            record["workloads"][name] = measure(name, sides, options.repeats, options.trace)
        except SideFailed as error:
            print(f"benchmark_step: {error}", file=sys.stderr)
            return 1
        print(table(name, record["workloads"][name]), flush=True)
        if options.out:
            options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
