"""`megatron-safe plan STAGE --config run.yaml`: memory by role and part, whether it fits, and the step's time.

It starts no process group, loads no weights and needs no GPU.
"""

import argparse
from pathlib import Path

from megatron_safe.errors import UserError
from megatron_safe.planning.layout import Layout, nearest
from megatron_safe.planning.machine import Machine, load_machine
from megatron_safe.planning.plan import MemoryPlan, Seconds, StageMemory, memory_plan, step_seconds
from megatron_safe.planning.workload import PPO, SUPERVISED, Expected, Workload, layout_of, workload_of

GIB = 2**30
PARTS = ("weights", "gradients", "optimizer")
PHASES = ("generate", "score", "train")


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"plan: {message}")


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The plan's own arguments, and what is left for the stage's config."""
    parser = _Parser(
        prog="megatron-safe plan",
        description="Memory and time of a stage's step on paper; further arguments are the stage's own.",
        allow_abbrev=False,
    )
    parser.add_argument("stage", help="whose config it is: ppo-lag, ppo, ppo-reward-shaping, sft, reward or cost")
    parser.add_argument("--machine", required=True, metavar="FILE.json", help="docs/benchmarks/machines/*.json")
    parser.add_argument("--world_size", type=int, default=1, help="ranks in all")
    parser.add_argument("--vocab_size", type=int, help="tokens of the tokenizer (default: of tokenizer.path)")
    parser.add_argument("--mean_prompt_length", type=float, help="tokens (default: the longest prompt)")
    parser.add_argument("--mean_new_tokens", type=float, help="of an answer (default: the longest)")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="the step's time by phase")
    if not arguments or arguments[0].startswith("-"):
        # `plan --help` and `plan` without a stage; anything else that begins with a dash belongs behind the stage.
        parser.parse_args(arguments[:1])
    return parser.parse_known_args(arguments)


def main(arguments: list[str], parse_config) -> None:
    """Print the plan. `parse_config(stage, arguments)`: the config that the run itself would have.

    Raises:
        UserError: a setting, a file or a layout that cannot be.
    """
    options, rest = parse(arguments)
    if options.stage not in (*PPO, *SUPERVISED):
        raise UserError(f"plan: expected one of {', '.join((*PPO, *SUPERVISED))}, found {options.stage!r}")
    machine = load_machine(options.machine)
    config = parse_config(options.stage, rest)
    layout = layout_of(config, options.world_size)
    expected = Expected(options.mean_prompt_length, options.mean_new_tokens, options.vocab_size)
    work = workload_of(config, options.stage, layout, expected)
    for name in ("flops", "decode_flops", "attention_flops"):
        if work.precision not in getattr(machine, name):
            raise UserError(f"--machine {options.machine}: {name}: expected {work.precision} in it")
    found = memory_plan(work, layout, machine)
    print(text(work, layout, machine, found))
    if not found.fits:
        better = nearest(
            layout, work.models, work.update_rows, machine.devices_per_node,
            lambda other: memory_plan(work, other, machine).fits,
        )  # fmt: skip
        print(f"The nearest layout that fits: {better}" if better else "No layout of this world fits.")
        return
    seconds = step_seconds(work, layout, max(1, found.slots), machine)
    print("\n" + "\n".join(time_table(work, seconds, machine)))
    if options.picture:
        draw([(f"{options.stage}, {layout}", seconds)], machine, options.picture)


def text(work: Workload, layout: Layout, machine: Machine, found: MemoryPlan) -> str:
    """The memory of each stage, and the verdict."""
    lines = [f"{work.stage} on {layout.world} x {machine.name}: {layout}", ""]
    for first, stages in _alike(found.stages):
        if layout.pp > 1:
            last = first + len(stages) - 1
            lines.append(f"Pipeline stage {first}" if first == last else f"Pipeline stages {first} to {last}")
        lines += [*memory_table(stages), ""]
    verdict = "It fits" if found.fits else "It does NOT fit"
    lines.append(f"{verdict}: at most {found.worst / GIB:.2f} of {found.capacity / GIB:.2f} GiB that tensors may take"
                 + (" (no room for one slot of the rollout's cache)" if not found.slots else "") + ".")  # fmt: skip
    if work.generates and found.slots:
        lines.append(f"Answers decoded at once on a data-parallel rank: {found.slots}.")
    return "\n".join(lines)


def memory_table(stages: list[StageMemory]) -> list[str]:
    """GiB on each rank of stages whose roles take the same: a line for each role, and one for each phase with what
    comes on top, on the stage where that is most."""
    lines = [f"{'GiB':16}" + "".join(f"{part:>12}" for part in (*PARTS, "sum"))]
    for name, parts in stages[0].roles.items():
        values = [*(parts[part] for part in PARTS), sum(parts.values())]
        lines.append(f"{name:16}" + "".join(f"{value / GIB:12.3f}" for value in values))
    lines.append(f"{'all roles':52}{stages[0].resident / GIB:12.3f}")
    for phase in PHASES:
        if phase in stages[0].phases:
            stage = max(stages, key=lambda stage, phase=phase: stage.peaks[phase])
            on_top = [f"{part} {value / GIB:.3f}" for part, value in stage.phases[phase].items() if value]
            lines.append(f"{'and to ' + phase:52}{stage.peaks[phase] / GIB:12.3f}  ({', '.join(on_top)})")
    return lines


def time_table(work: Workload, seconds: Seconds, machine: Machine) -> list[str]:
    """Seconds of a step by phase, and tokens/s."""
    kind = "measured on such a machine" if machine.basis == "measured" else "of a data sheet, not measured"
    lines = [f"PREDICTED seconds of a step, from constants {kind} ({machine.name}):"]
    total = sum(sum(parts.values()) for parts in seconds.values())
    for phase, parts in seconds.items():
        whole = sum(parts.values())
        detail = ", ".join(f"{name} {value:.3g}" for name, value in parts.items())
        lines.append(f"{phase:16}{whole:12.3f} s {100 * whole / total:5.1f}%  ({detail})")
    tokens = work.rows * (work.answer if work.generates else work.length)
    kind = "answer tokens" if work.generates else "tokens"
    lines.append(f"{'step':16}{total:12.3f} s, {tokens / total:.0f} {kind}/s")
    return lines


def _alike(stages: list[StageMemory]) -> list[tuple[int, list[StageMemory]]]:
    """Neighbours whose roles take the same, with the number of the first."""
    runs: list[tuple[int, list[StageMemory]]] = []
    for number, stage in enumerate(stages):
        if runs and runs[-1][1][0].roles == stage.roles:
            runs[-1][1].append(stage)
        else:
            runs.append((number, [stage]))
    return runs


def draw(plans: list[tuple[str, Seconds]], machine: Machine, path: Path) -> None:
    """One bar for each (label, seconds): its step's time by phase."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.6 * len(plans)), layout="constrained")
    totals = [sum(sum(parts.values()) for parts in seconds.values()) for _, seconds in plans]
    left = [0.0] * len(plans)
    for phase in PHASES:
        widths = [sum(seconds.get(phase, {}).values()) for _, seconds in plans]
        bars = axes.barh([name for name, _ in plans], widths, left=left, label=phase)
        shares = [width / total for width, total in zip(widths, totals, strict=True)]
        axes.bar_label(bars, [f"{100 * share:.0f}%" if share > 0.04 else "" for share in shares], label_type="center")
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("seconds of a step")
    axes.set_title(f"Predicted, not measured ({machine.name}, constants: {machine.basis})", fontsize=10)
    axes.legend()
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise UserError(f"--picture {path}: {error.strerror}") from error
    finally:
        pyplot.close(figure)
