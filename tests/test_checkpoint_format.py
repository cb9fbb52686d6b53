"""What is written is what is read; damaged files are in training/test_checkpoint.py."""

import subprocess
import sys
import zlib

from megatron_safe.checkpoint_format import (
    Checkpoint,
    fingerprint,
    read_manifest,
    write_manifest,
    write_state,
)


def test_state_and_manifest_come_back(tmp_path):
    roles = {"actor": ({"num_layers": 2}, 43), "critic": ({"num_layers": 3}, 44)}
    write_state(tmp_path, 7, 5, roles, {"lambda": 0.5})
    assert Checkpoint.read(tmp_path) == Checkpoint(
        tmp_path, 7, 5,
        {
            "actor": {"model": {"num_layers": 2}, "vocab_size": 43},
            "critic": {"model": {"num_layers": 3}, "vocab_size": 44},
        },
        {"lambda": 0.5},
    )  # fmt: skip
    content = bytes(range(256)) * 20_000  # more than is read at a time
    (tmp_path / "large").write_bytes(content)
    sums = {name: fingerprint(tmp_path / name) for name in ("large", "state.json")}
    assert sums["large"] == {"bytes": len(content), "crc32": zlib.crc32(content)}
    write_manifest(tmp_path, sums)
    assert read_manifest(tmp_path) == sums


def test_it_needs_no_megatron_core():
    program = "import sys, megatron_safe.checkpoint_format; sys.exit('megatron' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
