"""The tiny world's truth as the judge of `megatron-safe evaluate`:

    --judge.kind=program --judge.program.path=examples/quickstart/world_judge.py:WorldJudge
"""

from collections.abc import Sequence

from judge import judge
from world import World

from megatron_safe.evaluation.answers import Answer
from megatron_safe.evaluation.judges import Judgement


class WorldJudge:
    """Judges by the rules of `judge.py`, which score single answers."""

    def __init__(self, world_seed: int = 2023):
        self.world = World(world_seed)

    def judge(self, answers: Sequence[Answer]) -> list[Judgement]:
        """Raises UserError for a prompt that is not of this world."""
        truths = [judge(self.world, one.prompt, one.response, ended=one.ended) for one in answers]
        return [Judgement(one.helpfulness, one.harmful, float(one.harmful), one.refusal) for one in truths]
