"""The config of one stage inside a job: what all stages share, the stage's own settings, and the round's."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_safe.config import RoundsConfig
from megatron_safe.errors import UserError

_SHARED = ("parallel", "kernels", "tokenizer")


def stage_config(
    job: RoundsConfig, stage: str, place: str, settings: Sequence[Mapping[str, Any]],
    parse: Callable[[str, list[str]], Any],
):  # fmt: skip
    """A stage's config. Later mappings go over earlier ones, key by key; a mapping's `config` names a YAML file that
    goes below it.

    Args:
        place: the part of the job's config that says it, for messages.
        parse: `cli.parse`.

    Raises:
        UserError: what `parse` says, with `place` before it; or a setting that the job fills in.
    """
    shared = {name: dataclasses.asdict(getattr(job, name)) for name in _SHARED}
    run = dataclasses.asdict(job.run)
    arguments = ["--config=" + json.dumps(shared | {"run": run})]
    for mapping in settings:
        mapping = dict(mapping)
        for name in _SHARED:
            if name in mapping:
                raise UserError(f"{place}: {name}: expected only in the job's own settings, found it here too")
        if "config" in mapping:
            arguments.append(f"--config={mapping.pop('config')}")
        arguments.append("--config=" + json.dumps(mapping))
    try:
        return parse(stage, arguments)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
