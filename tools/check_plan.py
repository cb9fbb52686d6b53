#!/usr/bin/env python3
"""Compares predicted step times with those that tools/benchmark_step.py measured.

    python tools/check_plan.py docs/benchmarks/step.json --one one.json --two two.json

The machine files are tools/measure_machine.py's: of one process with two threads, and of two with one each. Ends with 1
where a step is predicted worse than within 20%.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from step_side import LAYOUTS, PHASES, WORKLOADS

from megatron_safe.errors import UserError
from megatron_safe.planning.layout import Layout
from megatron_safe.planning.machine import Machine, load_machine
from megatron_safe.planning.plan import memory_plan, step_seconds
from megatron_safe.planning.workload import Expected, workload_of

WITHIN = 0.2


def predict(name: str, side: str, machine: Machine) -> dict[str, float]:
    """Seconds of each phase, and of the step, of a workload in a layout."""
    workload, layout = WORKLOADS[name], Layout(*LAYOUTS[side])
    model = workload.model
    config = dataclasses.replace(workload.settings(), actor=model, reward_model=model, cost_model=model)
    mean = float(workload.limits_B().double().mean())
    expected = Expected(workload.prompt_length, mean, workload.vocab_size)
    work = workload_of(config, "ppo-lag", layout, expected)
    parts = step_seconds(work, layout, memory_plan(work, layout, machine).slots, machine)
    seconds = {phase: sum(parts[phase].values()) for phase in PHASES}
    return seconds | {"step": sum(seconds.values())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path, metavar="STEP.json")
    parser.add_argument("--one", required=True, metavar="FILE.json", help="one process, two threads")
    parser.add_argument("--two", required=True, metavar="FILE.json", help="two processes, one thread each")
    options = parser.parse_args()
    try:
        one, two = load_machine(options.one), load_machine(options.two)
        measured = json.loads(options.measured.read_text(encoding="utf-8"))["workloads"]
    except UserError as error:
        parser.error(str(error))
    worst = 0.0
    print(f"{'':8}" + "".join(f"{phase:>24}" for phase in (*PHASES, "step")) + "   predicted s, measured s, error")
    for name, found in measured.items():
        for side, row in {"one": found["ours"], **found["layouts"]}.items():
            predicted = predict(name, side, one if side == "one" else two)
            line = f"{name} {side:6}"
            for phase, seconds in predicted.items():
                error = seconds / row["seconds"][phase] - 1
                line += f"{seconds:8.3f}{row['seconds'][phase]:8.3f}{100 * error:+7.0f}%"
            print(line)
            worst = max(worst, abs(error))  # the step's, which comes last
    print(f"worst error of a step: {100 * worst:.0f}%")
    return int(worst > WITHIN)


if __name__ == "__main__":
    sys.exit(main())
