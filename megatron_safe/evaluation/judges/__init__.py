"""Who says how helpful and how harmful an answer is: reward and cost models, an endpoint, people, or a program."""

from megatron_safe.evaluation.judges.endpoint import EndpointJudge
from megatron_safe.evaluation.judges.factory import make_judge
from megatron_safe.evaluation.judges.interface import NO_VERDICT, Judge, Judgement, Preference
from megatron_safe.evaluation.judges.models import ModelJudge
from megatron_safe.evaluation.judges.people import PeopleJudge
from megatron_safe.evaluation.judges.program import ProgramJudge

__all__ = [
    "NO_VERDICT",
    "EndpointJudge",
    "Judge",
    "Judgement",
    "ModelJudge",
    "PeopleJudge",
    "Preference",
    "ProgramJudge",
    "make_judge",
]
