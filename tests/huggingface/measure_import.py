#!/usr/bin/env python3
"""Time and peak memory of importing a Llama of 1.1 billion random parameters, beside a copy of the same files.

    python tests/huggingface/measure_import.py [--folder DIR] [--rounds 3] [--warm]

A program and no test: it needs 7 GB of disk, Linux, and a quiet machine. Copy and import take turns, each in a process
of its own, from a cold page cache (--warm: from a warm one) to synced files. An import's seconds begin when its modules
are imported and end when its folder has its name; the start-up before is printed by itself. Exit code 1 if the median
import took more than 1.3 times the median copy, or any more than 3 GB.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

MOST_TIMES, MOST_BYTES = 1.3, 3e9
HIDDEN, FFN, LAYERS, HEADS, GROUPS, VOCABULARY = 2048, 5632, 22, 32, 4, 32_000
COPY = """
import os, shutil, sys, time
from pathlib import Path
start, out = time.perf_counter(), Path(sys.argv[2])
out.mkdir()
for path in Path(sys.argv[1]).iterdir():
    shutil.copyfile(path, out / path.name)
    with open(out / path.name, "rb") as file:
        os.fsync(file.fileno())
print(0.0, time.perf_counter() - start, 0)
"""
IMPORT = """
import sys, time
start = time.perf_counter()
from pathlib import Path
from megatron_safe.huggingface.importing import Import
ready = time.perf_counter()
Import.of(Path(sys.argv[1])).write(Path(sys.argv[2]))
seconds = time.perf_counter() - ready
(peak,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(ready - start, seconds, 1024 * int(peak))
"""


def build(folder: Path) -> int:
    """Two shards, as `transformers` would cut them; bytes of weights."""
    rows = HIDDEN // HEADS * GROUPS
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}."
        shapes |= {f"{name}self_attn.{each}_proj.weight": (HIDDEN, HIDDEN) for each in "qo"}
        shapes |= {f"{name}self_attn.{each}_proj.weight": (rows, HIDDEN) for each in "kv"}
        shapes |= {f"{name}mlp.{each}_proj.weight": (FFN, HIDDEN) for each in ("gate", "up")}
        shapes[f"{name}mlp.down_proj.weight"] = (HIDDEN, FFN)
        shapes |= {f"{name}{each}_layernorm.weight": (HIDDEN,) for each in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    folder.mkdir()
    names, places, total = list(shapes), {}, 0
    for i, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"model-{i:05d}-of-00002.safetensors"
        tensors = {name: torch.randn(shapes[name], dtype=torch.bfloat16) for name in part}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
        total += sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    config = dict(
        architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=HIDDEN, intermediate_size=FFN,
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=GROUPS, vocab_size=VOCABULARY,
        max_position_embeddings=2048, rms_norm_eps=1e-5, torch_dtype="bfloat16",
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return total


def forget(folder: Path) -> None:
    """Drop the folder's files from the page cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(code: str, source: Path, out: Path, warm: bool) -> tuple[float, float, int]:
    """Seconds of start-up and of work, and peak bytes of a process."""
    if not warm:
        forget(source)
    command = [sys.executable, "-c", code, str(source), str(out)]
    text = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    shutil.rmtree(out)
    startup, seconds, peak = text.split()
    return float(startup), float(seconds), int(peak)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as work:
        source = Path(work) / "source"
        total = build(source)
        copies, imports, startups, peaks = [], [], [], []
        for _ in range(options.rounds):
            copies.append(run(COPY, source, Path(work) / "copy", options.warm)[1])
            startup, seconds, peak = run(IMPORT, source, Path(work) / "import", options.warm)
            imports.append(seconds)
            startups.append(startup)
            peaks.append(peak)
            print(f"copy {copies[-1]:.2f} s, import {seconds:.2f} s, peak {peak / 1e9:.2f} GB", flush=True)
    copy, imported, peak = statistics.median(copies), statistics.median(imports), max(peaks)
    print(
        f"{total / 1e9:.2f} GB: copy {copy:.2f} s, import {imported:.2f} s ({imported / copy:.2f} times), peak "
        f"{peak / 1e9:.2f} GB; start-up {statistics.median(startups):.2f} s"
    )
    return 0 if imported <= MOST_TIMES * copy and peak < MOST_BYTES else 1


if __name__ == "__main__":
    sys.exit(main())
