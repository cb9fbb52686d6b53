"""Started by torchrun: rank 1 cannot write its weights, then rank 0 cannot write the manifest, then all is well.

usage: failing_save.py RUN_FOLDER

Each rank writes one line for each attempt to RUN_FOLDER/rank0.txt, rank1.txt.
"""

import sys
from pathlib import Path

from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_safe.config import ModelConfig, ParallelConfig
from megatron_safe.models.roles import Role
from megatron_safe.runtime import start
from megatron_safe.training import checkpoint


def full(*_, **__):
    raise OSError(28, "No space left on device")


def main(run: Path) -> None:
    model = ModelConfig(num_layers=1, hidden_size=16, ffn_hidden_size=16, num_attention_heads=2, vocab_multiple=8)
    with start(ParallelConfig(2, 1, timeout_seconds=60.0), 0) as runtime:
        actor = Role("actor", model, runtime, 11, "fp32", 0)
        for culprit, module, name in ((1, filesystem_async, "_write_item"), (0, checkpoint, "sync"), (None, None, "")):
            if runtime.rank == culprit:
                plain = getattr(module, name)
                setattr(module, name, full)
            try:
                checkpoint.save(run, 1, [actor], {}, 0, runtime, keep_last=1)
                end = "saved"
            except OSError as error:
                end = f"OSError {error}"
            if runtime.rank == culprit:
                setattr(module, name, plain)
            published = checkpoint.has_checkpoints(run)
            runtime.barrier()
            with (run / f"rank{runtime.rank}.txt").open("a") as file:
                file.write(f"{'published' if published else 'nothing'}: {end}".splitlines()[0] + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
