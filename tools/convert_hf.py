#!/usr/bin/env python3
"""Hugging Face checkpoints in and out.

    python tools/convert_hf.py import --hf DIR --out RUN
    python tools/convert_hf.py export --checkpoint RUN --out DIR
    python tools/convert_hf.py inspect DIR

`import` makes a run folder that `model.checkpoint` can name (which can name the Hugging Face folder itself, too).
`export` writes what `transformers` and vLLM load as it is: what was imported, to the bit, or what was trained from it,
or from nothing. `inspect` says what either kind of folder holds, and which layouts it fits.

The output appears whole or not at all, and nothing is overwritten.
"""

import argparse
import math
import signal
import sys
import time
from pathlib import Path

import torch
import yaml
from tqdm import tqdm

from megatron_safe.config import ModelConfig, ParallelConfig
from megatron_safe.errors import UserError
from megatron_safe.huggingface.distcp import Reader
from megatron_safe.huggingface.exporting import Export, describe_role
from megatron_safe.huggingface.families import Description
from megatron_safe.huggingface.folder import is_huggingface
from megatron_safe.huggingface.importing import Import, short_name
from megatron_safe.huggingface.layout import huggingface_tensors, stored_tensors
from megatron_safe.huggingface.loading import HuggingFaceModel
from megatron_safe.models.llama import check_model_fits, padded_vocab_size
from megatron_safe.models.roles import VALUES
from megatron_safe.models.rope import head_dim
from megatron_safe.runtime import start
from megatron_safe.training import checkpoint

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HEADS = {"lm": "language", "score": "scalar"}
_PLAIN_LINE_SECONDS = 5.0


class Progress:
    """A bar on a terminal; a line now and then in a log."""

    def __init__(self, label: str, total_bytes: int):
        self._label, self._total, self._done = label, total_bytes, 0
        self._start = self._printed = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(desc=label, total=total_bytes, unit="B", unit_scale=True, dynamic_ncols=True)

    def __call__(self, count: int) -> None:
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._printed >= _PLAIN_LINE_SECONDS:
            self._print()

    def _print(self) -> None:
        self._printed = time.monotonic()
        gigabytes = f"{self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB"
        print(f"{self._label}: {gigabytes}, {self._printed - self._start:.0f} s", file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind, *exception) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            self._print()


def import_folder(options: argparse.Namespace) -> None:
    found = Import.of(options.hf, options.dtype and DTYPES[options.dtype])
    head = found.model.description.head
    if options.role is not None and HEADS[options.role] != head:
        raise UserError(f"{options.hf}: expected a {HEADS[options.role]} head, as --role {options.role} has it, found "
                        f"a {head} one")  # fmt: skip
    found.check_output(options.out)
    summary = f"{_title(found.model.description)} -> {options.out}, role {found.role}, {found.total_bytes / 1e9:.2f} GB"
    if options.dry_run:
        print(f"{summary}: nothing written (--dry-run)")
        return
    with Progress("import", found.total_bytes) as progress:
        found.write(options.out, progress)
    print(summary)


def export_checkpoint(options: argparse.Namespace) -> None:
    if is_huggingface(options.checkpoint):
        raise UserError(f"{options.checkpoint}: expected a run folder or checkpoint, found a Hugging Face folder")
    with start(ParallelConfig(), 0) as runtime:  # which find() deals its checking out over
        found = checkpoint.find(options.checkpoint, runtime)
    role = _role_to_export(found, options.role)
    tokenizer, template = _tokenizer(found.path, options.tokenizer)
    came_with_one = (found.path / "huggingface" / role).is_dir()
    export = Export.of(
        found.path, role, found.roles[role], options.dtype and DTYPES[options.dtype], options.max_shard_size,
        options.tokenizer if came_with_one else tokenizer, template,
    )  # fmt: skip
    export.check_output(options.out)
    summary = (
        f"{found.path}, role {role}: {_title(export.description)} -> {options.out}, "
        f"{export.plan.total_bytes / 1e9:.2f} GB in {len(export.plan.files)} file(s)"
    )
    if options.dry_run:
        print(f"{summary}: nothing written (--dry-run)")
        return
    with Progress("export", export.plan.total_bytes) as progress:
        export.write(options.out, progress)
    print(summary)


def _role_to_export(found: checkpoint.Checkpoint, wanted: str | None) -> str:
    choices = ", ".join(found.roles)
    if wanted is None:
        if "actor" in found.roles:
            return "actor"
        if len(found.roles) == 1:
            return next(iter(found.roles))
        raise UserError(f"{found.path}: expected --role to say which of its roles to export: {choices}")
    if wanted not in found.roles:
        raise UserError(f"{found.path}: expected --role to be one of its roles, {choices}; found {wanted}")
    return wanted


def _tokenizer(checkpoint_path: Path, given: Path | None) -> tuple[Path | None, str]:
    """The tokenizer of the run that a checkpoint belongs to, unless one is given; and the run's prompt template."""
    config = checkpoint_path.parent.parent / "config.yaml"
    try:
        section = yaml.safe_load(config.read_text(encoding="utf-8"))["tokenizer"] if config.is_file() else {}
        path, template = section.get("path"), section.get("template", "plain")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"{config}: expected the config of a run, found {type(error).__name__}") from error
    if given is None and path and not Path(path).exists():
        raise UserError(f"{config}: tokenizer.path: {path} is not there (any more); name one with --tokenizer")
    return given or (Path(path) if path else None), template


def inspect(options: argparse.Namespace) -> None:
    if is_huggingface(options.folder):
        model = HuggingFaceModel.open(options.folder)
        dtypes = {entry.dtype for entry in model.folder.entries.values()}
        files = len({entry.file for entry in model.folder.entries.values()})
        _print_table({"folder": str(options.folder), "files of weights": str(files)})
        _print_table(_facts(model.description, dtypes))
        return
    found = _newest(options.folder)
    _print_table({"checkpoint": str(found.path), "step": str(found.step), "roles": ", ".join(found.roles)})
    reader = Reader(found.path / "weights")
    for role, saved in found.roles.items():
        if len(VALUES.get(role, ())) > 1:
            _print_table({"role": role, "head": "two scores, the values of reward and cost: cannot be exported"})
            continue
        description = describe_role(found.path, role, saved)
        dtypes = {reader.dtype(f"{role}.{stored.key}") for stored in stored_tensors(description)}
        _print_table({"role": role} | _facts(description, dtypes))


def _newest(path: Path) -> checkpoint.Checkpoint:
    """Without the checksums of `checkpoint.find`, which would read all of it."""
    candidates = [path, *sorted((path / "checkpoints").glob("step_*"), reverse=True)]
    for candidate in candidates:
        if (candidate / "state.json").is_file():
            return checkpoint.Checkpoint.read(candidate)
    raise UserError(f"{path}: expected config.json of a Hugging Face folder, a run folder or a checkpoint, found none")


def _facts(description: Description, dtypes: set[torch.dtype]) -> dict[str, str]:
    model = description.model
    heads, groups = model.num_attention_heads, model.num_query_groups or model.num_attention_heads
    padded = padded_vocab_size(description.vocab_size, model.vocab_multiple)
    rope = model.rope_type if model.rope_type == "default" else f"{model.rope_type}, factor {model.rope_factor:g}"
    return {
        "architecture": _title(description),
        "parameters": f"{sum(map(math.prod, huggingface_tensors(description).values())):,}",
        "types": ", ".join(sorted(map(short_name, dtypes))),
        "vocabulary": f"{description.vocab_size:,} (stored as {padded:,})",
        "head": _head(description),
        "layers": f"{model.num_layers} of width {model.hidden_size}, SwiGLU {model.ffn_hidden_size}",
        "heads": f"{heads}, key/value heads {groups}, of {head_dim(model)}",
        "positions": f"{model.max_sequence_length:,}, RoPE {rope}, base {model.rotary_base:g}"
        + (f", window {model.sliding_window}" if model.sliding_window else ""),
        "tensor parallel": _sizes(model, heads, lambda size: (size, 1)),
        "pipeline parallel": _sizes(model, model.num_layers, lambda size: (1, size)),
    }


def _head(description: Description) -> str:
    if description.head == "language":
        return "language, tied to the embedding" if description.model.tie_embeddings else "language"
    normalized = (description.model.score_mean, description.model.score_std) != (0.0, 1.0)
    return "score" + (" with bias" if description.model.score_bias else "") + (", normalized" if normalized else "")


def _title(description: Description) -> str:
    return description.family.architecture(description.score)


def _sizes(model: ModelConfig, most: int, layout) -> str:
    """The sizes in which the model can be split."""
    fitting = []
    for size in range(1, most + 1):
        try:
            check_model_fits(model, *layout(size), "model")
            fitting.append(str(size))
        except UserError:
            pass
    return ", ".join(fitting) or "none"


def _print_table(rows: dict[str, str]) -> None:
    for name, value in rows.items():
        print(f"{name:<18}{value}")
    print()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    into = commands.add_parser("import", help="Hugging Face folder -> run folder")
    into.add_argument("--hf", type=Path, required=True, help="Hugging Face folder")
    into.add_argument("--out", type=Path, required=True, help="run folder to make")
    into.add_argument("--role", choices=HEADS, help="refuse the folder unless it has this head (default: what it has)")
    into.set_defaults(run=import_folder)

    out = commands.add_parser("export", help="run folder or checkpoint -> Hugging Face folder")
    out.add_argument("--checkpoint", type=Path, required=True, help="checkpoint, or run folder (its newest good one)")
    out.add_argument("--out", type=Path, required=True, help="Hugging Face folder to make")
    out.add_argument("--role", help="actor, reward_model, cost_model, ... (default: the actor, or the only one)")
    out.add_argument("--max-shard-size", help="such as 5GB (default: files as they came)")
    out.add_argument("--tokenizer", type=Path, help="tokenizer to export (default: as it came, or the run's)")
    out.set_defaults(run=export_checkpoint)

    for command in (into, out):
        command.add_argument("--dtype", choices=DTYPES, help="of all weights (default: as they came)")
        command.add_argument("--dry-run", action="store_true", help="check everything and write nothing")

    look = commands.add_parser("inspect", help="what a folder of either kind holds")
    look.add_argument("folder", type=Path)
    look.set_defaults(run=inspect)
    return parser.parse_args(arguments)


def _terminate(signum, frame) -> None:
    raise SystemExit(128 + signum)  # unwinds, so that what was begun is removed


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 after one line about what the user gave, or 130 where they interrupted."""
    options = parse(arguments)
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, _terminate)
    try:
        options.run(options)
    except UserError as error:
        print(f"convert_hf: error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("convert_hf: interrupted; nothing was written", file=sys.stderr, flush=True)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
