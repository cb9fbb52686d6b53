#!/usr/bin/env python3
"""Writes docs/planning/README.md and its picture: `megatron-safe plan` for the configs beside them.

    python tools/plan_examples.py
"""

import shlex
import sys
from pathlib import Path

from megatron_safe.cli import parse
from megatron_safe.planning import report
from megatron_safe.planning.machine import load_machine
from megatron_safe.planning.plan import memory_plan, step_seconds
from megatron_safe.planning.workload import Expected, layout_of, workload_of

ROOT = Path(__file__).parents[1]
FOLDER = Path("docs/planning")
MACHINE = "docs/benchmarks/machines/h100.json"
WORLDS = {"7b-8": 8, "70b-64": 64, "70b-512": 512}
TITLES = {"7b-8": "7B on 8 H100s", "70b-64": "70B on 64 H100s", "70b-512": "70B on 512 H100s"}
EXPECTED = Expected(mean_prompt_length=128, mean_new_tokens=256, vocab_size=32000)

HEAD = """# What a step would take

Predictions, not measurements: no run here has had such a machine. Bytes come from formulas that hold within 10% of
what tiny models take on a CPU (`tests/planning/test_measured_memory.py`). Seconds come from a data sheet and from
assumed efficiencies, which [the machine's file](../benchmarks/machines/h100.json) spells out; another machine needs
another file (`tools/measure_machine.py` writes a CPU's). All of this is written by `python tools/plan_examples.py`;
each table alone by the command above it.

Prompts have 128 tokens on average, answers 256 (geometric, cut at 512). A rollout is one batch with one update.

![seconds of a step by phase](step.png)
"""


def main() -> int:
    machine, sections, bars = load_machine(str(ROOT / MACHINE)), [HEAD], []
    for name, world in WORLDS.items():
        config = parse("ppo-lag", ["--config", str(ROOT / FOLDER / f"{name}.yaml")])
        layout = layout_of(config, world)
        work = workload_of(config, "ppo-lag", layout, EXPECTED)
        found = memory_plan(work, layout, machine)
        seconds = step_seconds(work, layout, found.slots, machine)
        bars.append((f"{TITLES[name]}, {work.rows} rows\n{layout}", seconds))
        command = [
            "megatron-safe", "plan", "ppo-lag", "--config", f"{FOLDER / name}.yaml", "--world_size", str(world),
            "--machine", MACHINE, "--vocab_size", str(EXPECTED.vocab_size),
            "--mean_prompt_length", str(EXPECTED.mean_prompt_length),
            "--mean_new_tokens", str(EXPECTED.mean_new_tokens),
        ]  # fmt: skip
        printed = report.text(work, layout, machine, found) + "\n\n" + "\n".join(
            report.time_table(work, seconds, machine)
        )
        sections.append(f"## {TITLES[name]}\n\n```bash\n{shlex.join(command)}\n```\n```\n{printed}\n```\n")
    (ROOT / FOLDER / "README.md").write_text("\n".join(sections), encoding="utf-8")
    report.draw(bars, machine, ROOT / FOLDER / "step.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
