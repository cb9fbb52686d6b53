"""What can be wrong with a job: its settings before the first stage, a folder begun with others, useless labels."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from megatron_safe.data.mixture import read
from megatron_safe.errors import UserError
from megatron_safe.evaluation.attacks import BUILT_IN, read_templates
from megatron_safe.evaluation.judges import make_judge
from megatron_safe.programs import Program

if TYPE_CHECKING:
    from megatron_safe.rounds.loop import Loop


def check_job(loop: "Loop") -> None:
    """The settings of all stages of all rounds, and the files that they name. Raises UserError."""
    config = loop.config
    if not config.rounds:
        raise UserError("rounds: expected at least one, found none")
    if not (config.start or config.sft):
        raise UserError("start, sft: expected a policy to start from or the settings of its SFT, found neither")
    if not 0 <= config.against_first <= 1 or not 0 < config.held_out < 1:
        raise UserError("against_first, held_out: expected shares of the pairs, held_out above 0 and below 1")
    if config.run.stop_after:
        raise UserError("run.stop_after: expected 0, because a job's stages run to their ends; found another number")
    for name, settings in config.sft.items():
        loop.stage_config("sft", f"sft.{name}", settings)
    loop.stage_config("generate", "generate", config.generate)
    for number, settings in enumerate(config.rounds, start=1):
        _check_round(loop, number, settings)
    _check_annotator(loop)
    if config.evaluate is not None:
        evaluate = loop.stage_config("evaluate", "evaluate", config.evaluate)
        read("prompts", "evaluate.data.prompts", evaluate.data.prompts, weighted=False, say=lambda _: None)
        make_judge(evaluate.judge, loop.out / "evaluate", loop.runtime)


def _check_round(loop: "Loop", number: int, settings) -> None:
    config, place = loop.config, f"rounds[{number - 1}]"
    for stage in ("reward", "cost"):
        loop.stage_config(stage, f"{place}.{stage}", getattr(config, stage), getattr(settings, stage))
    ppo = loop.stage_config("ppo-lag", f"{place}.ppo", config.ppo, settings.ppo)
    if settings.red_team is not None:
        if number == 1 and config.cost_model is None:
            raise UserError(f"{place}.red_team: expected a cost_model to rank attacks by, found none yet")
        attack = loop.stage_config("red-team", f"{place}.red_team", config.red_team, settings.red_team)
        seeds = attack.data.prompts
        read("prompts", f"{place}.red_team.data.prompts", seeds, weighted=False, say=lambda _: None)
        read_templates(attack.red_team.templates or BUILT_IN)
    attacked = any(one.red_team is not None for one in config.rounds[:number])
    if attacked and any(isinstance(entry, Mapping) and entry.get("weight") for entry in ppo.data.prompts):
        raise UserError(f"{place}.ppo: data.prompts: expected no weights, because attacks join them; found some")
    asked = loop.prompts(number, settings)
    pairs = settings.pairs or len(asked)
    if pairs < 2:
        raise UserError(f"{place}.pairs: expected 2 or more, one of them to hold out, found {pairs}")


def _check_annotator(loop: "Loop") -> None:
    annotator = loop.config.annotator
    if annotator.kind == "program":

        def can_be_called() -> None:
            Program(annotator.program.path, "annotator.program.path")

        loop.runtime.on_main(can_be_called)
    elif annotator.kind == "judge":
        if annotator.judge.kind == "models":
            # The models that learn from the labels cannot be the ones that give them.
            raise UserError("annotator.judge.kind: expected endpoint, people or program, found models")
        make_judge(annotator.judge, loop.out, loop.runtime)
    elif not 0 < annotator.least_labelled <= 1:
        raise UserError(
            f"annotator.least_labelled: expected a share above 0 and up to 1, found {annotator.least_labelled}"
        )


def check_begun(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise UserError where a stage was begun with other settings than it would be run with now."""
    path = folder / "config.yaml"
    try:
        found = _flat(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: expected the config of a stage, found {type(error).__name__}") from None
    now = _flat(json.loads(json.dumps(config)))  # tuples as lists, as YAML has them
    for name, value in now.items():
        if not name.startswith(("run.", "parallel.", "kernels.")) and found.get(name) != value:
            raise UserError(
                f"{folder}: begun with {name} {found.get(name)!r}, and the job says {value!r} now; choose another "
                "run.out, or delete this folder, all that were made after it, and their lines in rounds.json"
            )


def check_labels(rows: Sequence[Mapping[str, Any]], place: str) -> None:
    """Raise UserError for a labelled pair without its texts."""
    for at, row in enumerate(rows):
        for name in ("prompt", "response_0", "response_1"):
            if not isinstance(row.get(name), str):
                found = type(row.get(name)).__name__
                raise UserError(f"{place}, pair {at}, field '{name}': expected a text, found {found}")


def check_useful(rows: Sequence[Mapping[str, Any]], place: str, safe_ones: bool) -> None:
    """Raise UserError for labels that a reward or a cost model cannot learn from, or be measured on.

    safe_ones: whether an answer labelled safe is needed, whose costs set the threshold.
    """
    for name in ("better_response_id", "safer_response_id"):
        if not any(row.get(name) in (0, 1) and not isinstance(row.get(name), bool) for row in rows):
            raise UserError(f"{place}: expected a pair with {name} 0 or 1, found none in {len(rows)}")
    if safe_ones and not any(row.get(f"is_response_{i}_safe") is True for row in rows for i in (0, 1)):
        raise UserError(f"{place}: expected an answer labelled safe, for threshold_share; found none in {len(rows)}")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
