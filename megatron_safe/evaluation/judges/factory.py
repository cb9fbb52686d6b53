"""From a config to the judge."""

from pathlib import Path

from megatron_safe.config import JudgeConfig
from megatron_safe.evaluation.judges.endpoint import EndpointJudge
from megatron_safe.evaluation.judges.interface import Judge
from megatron_safe.evaluation.judges.people import PeopleJudge
from megatron_safe.evaluation.judges.program import ProgramJudge
from megatron_safe.runtime import Runtime


def make_judge(config: JudgeConfig, folder: Path, runtime: Runtime) -> Judge | None:
    """The judge, with all that can be wrong with its settings checked; None for kind `models`.

    The models are the stage's own to load, once the policies have left them room: see `ModelJudge`.

    Args:
        folder: the run folder, where an endpoint's replies are kept unless its config says otherwise. Nothing is
            written before the first reply.

    Raises:
        UserError: as the judges.
    """
    if config.kind == "endpoint":
        return EndpointJudge(config.endpoint, Path(config.endpoint.cache or folder / "judge.jsonl"), runtime)
    if config.kind == "people":
        return PeopleJudge(config.people)
    if config.kind == "program":
        return ProgramJudge(config.program, runtime)
    return None
