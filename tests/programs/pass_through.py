"""Started by torchrun: what was imported, loaded in one layout and saved again from there.

usage: pass_through.py TP PP RUN...

Of each run folder with an imported model, RUN-again becomes a run folder with the same model, saved by all ranks.
"""

import sys
from pathlib import Path

import torch

from megatron_safe.config import ModelConfig, ParallelConfig
from megatron_safe.huggingface.origin import Origin
from megatron_safe.models.roles import Role
from megatron_safe.runtime import start
from megatron_safe.training import checkpoint


def main(tp: int, pp: int, runs: list[str]) -> None:
    with start(ParallelConfig(tp, pp, timeout_seconds=120.0), 0) as runtime:
        for run in runs:
            found = checkpoint.find(run, runtime)
            ((saved_role, saved),) = found.roles.items()
            role = Role(
                "actor" if saved_role == "actor" else "reward_model", ModelConfig(**saved["model"]), runtime,
                saved["vocab_size"], "fp32", 0, origin=Origin.of_checkpoint(found.path, saved_role),
            )  # fmt: skip
            with torch.no_grad():  # what is not loaded shall be noticed
                for parameter in role.module.parameters():
                    parameter.fill_(torch.nan)
            checkpoint.load_weights(role, found)
            checkpoint.save(Path(f"{run}-again"), 1, [role], {}, 0, runtime, keep_last=0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
