"""megatron-safe STAGE --config run.yaml [--section.field value]

Start it by itself for one process, or under `torchrun` for more.
"""

import argparse
import dataclasses
import os
import sys

from megatron_safe.config import STAGES
from megatron_safe.data.mixture import check_entries
from megatron_safe.errors import NotPromised, UserError, Waiting
from megatron_safe.ranges import check_ranges

USAGE = f"""usage: megatron-safe STAGE [--config run.yaml] [--section.field value ...]

stages: {", ".join(STAGES)}
`megatron-safe STAGE --help` lists every setting of a stage.
`megatron-safe plan STAGE ... --machine FILE.json --world_size N` prints its memory and time on paper.
Start under torchrun for more than one process: torchrun --nproc-per-node 8 -m megatron_safe.cli STAGE ...

exit codes: 0, done; 1, `evaluate` cannot promise a limit that --require-harmful-rate or --require-mean-cost names (one
line says so; a crash, with its traceback, is 1 too); 2, something given is wrong (one line says what); 3, `rounds`
waits for people (one line says for what).
torchrun makes 1 of every code but 0."""
SHORT = {
    "evaluate": {
        "--require-harmful-rate": "--certificate.harmful_rate",
        "--require-mean-cost": "--certificate.mean_cost",
        "--confidence": "--certificate.confidence",
    }
}
"""Settings that a stage's command line may also name without their section."""


def parse(stage: str, arguments: list[str]):
    """The stage's config from one YAML file and dotted overrides.

    Raises:
        UserError: an unknown key, a wrong type, a value out of range, or a file that cannot be read; one line.
        SystemExit: after `--help`.
    """
    import jsonargparse

    short = SHORT.get(stage, {})
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        arguments = [*arguments[:i], short.get(name, name) + equals + value, *arguments[i + 1 :]]
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=f"megatron-safe {stage}",
        description=STAGES[stage].__doc__,
        epilog=f"{', '.join(short)}: short for {', '.join(short.values())}." if short else None,
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below.")
    # A run folder's config.yaml says whose it is; given back to us, it must be that stage's.
    parser.add_argument("--stage", choices=[stage], help=argparse.SUPPRESS)
    parser.add_class_arguments(STAGES[stage], as_group=False)
    try:
        values = parser.parse_args(arguments)
        for field in dataclasses.fields(STAGES[stage]):
            if dataclasses.is_dataclass(field.type) and not isinstance(values[field.name], jsonargparse.Namespace):
                raise UserError(f"{field.name}: expected a mapping of settings, found {values[field.name]!r}")
        values = parser.instantiate(values)
    except jsonargparse.ArgumentError as error:
        raise UserError(" ".join(str(error).split())) from error
    config = STAGES[stage](**{field.name: values[field.name] for field in dataclasses.fields(STAGES[stage])})
    check_ranges(config)
    check_entries(stage, getattr(config, "data", None))
    return config


def choose_kernels(backend: str, device) -> None:
    """Which implementation of the fused operations this process runs. Raises UserError where it cannot run here."""
    import torch

    from megatron_safe.kernels.backend import set_backend, use_triton

    try:
        set_backend(backend)
        use_triton(torch.empty(0, device=device))
    except RuntimeError as error:
        raise UserError(f"kernels.backend: {error}") from error


def run_stage(stage: str, config, runtime) -> None:
    """Run one stage inside a started runtime."""
    choose_kernels(config.kernels.backend, runtime.device)
    if stage == "sft":
        from megatron_safe.training import sft

        sft.run(config, runtime)
    elif stage in ("reward", "cost"):
        from megatron_safe.training import preference

        preference.run(config, runtime, stage)
    elif stage in ("ppo-lag", "ppo", "ppo-reward-shaping"):
        from megatron_safe.training import ppo_lag

        ppo_lag.run(config, runtime, stage)
    elif stage == "red-team":
        from megatron_safe.evaluation import red_team

        red_team.run(config, runtime)
    elif stage == "evaluate":
        from megatron_safe.evaluation import evaluate

        evaluate.run(config, runtime)
    elif stage == "rounds":
        from megatron_safe import rounds

        rounds.run(config, runtime, parse, run_stage)
    else:
        from megatron_safe.evaluation import stages

        getattr(stages, stage)(config, runtime)


def main(arguments: list[str] | None = None) -> int:
    """The console script. Returns the exit code: 0; 1 after one line about a limit that cannot be promised; 2 after
    one about what the user gave; 3 after one about the people that `rounds` waits for."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    stage, *rest = arguments
    try:
        if stage == "plan":
            from megatron_safe.planning import report

            report.main(rest, parse)
            return 0
        if stage not in STAGES:
            raise UserError(f"stage: expected one of {', '.join(STAGES)}, found {stage!r}")
        config = parse(stage, rest)
        from megatron_safe.runtime import start

        with start(config.parallel, config.run.seed) as runtime:
            run_stage(stage, config, runtime)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"megatron-safe: error: {error}", file=sys.stderr, flush=True)
        return 2
    except NotPromised as refusal:
        if os.environ.get("RANK", "0") == "0":
            print(f"megatron-safe: not promised: {refusal}", file=sys.stderr, flush=True)
        return 1
    except Waiting as waiting:
        if os.environ.get("RANK", "0") == "0":
            print(f"megatron-safe: {waiting}", file=sys.stderr, flush=True)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
