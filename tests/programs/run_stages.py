"""Started by torchrun: run stages one after another in one process group, as the quickstart does.

usage: run_stages.py PLAN.json

The plan: {"tp": 1, "pp": 1, "seed": 0, "runs": [[stage, [arguments]], ...]}. What each run ended with, "" or the
message of a UserError, is written to PLAN.out.json.
"""

import json
import sys
from pathlib import Path

from megatron_safe.cli import parse, run_stage
from megatron_safe.config import ParallelConfig
from megatron_safe.errors import UserError
from megatron_safe.runtime import start


def main(path: Path) -> None:
    plan = json.loads(path.read_text())
    ends = []
    with start(ParallelConfig(plan["tp"], plan["pp"], timeout_seconds=120.0), plan["seed"]) as runtime:
        for stage, arguments in plan["runs"]:
            try:
                run_stage(stage, parse(stage, arguments), runtime)
                ends.append("")
            except UserError as error:
                ends.append(str(error))
        if runtime.is_main:
            path.with_suffix(".out.json").write_text(json.dumps(ends))


if __name__ == "__main__":  # saving a checkpoint starts a process that imports this file again
    main(Path(sys.argv[1]))
