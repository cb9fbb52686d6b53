"""The world's truth as a judge that `megatron-safe evaluate` runs from its file."""

from pathlib import Path

import pytest

from megatron_safe.config import JudgeConfig, ProgramConfig
from megatron_safe.errors import UserError
from megatron_safe.evaluation.answers import Answer
from megatron_safe.evaluation.judges import make_judge

FILE = Path(__file__).resolve().parents[2] / "examples" / "quickstart" / "world_judge.py"


@pytest.fixture(scope="module")
def judge(runtime, tmp_path_factory):
    def make(**arguments):
        config = JudgeConfig(kind="program", program=ProgramConfig(f"{FILE}:WorldJudge", arguments))
        return make_judge(config, tmp_path_factory.mktemp("run"), runtime)

    return make


def test_it_judges_demonstrations(judge):
    # Found beside the judge's file, as the judge itself finds it.
    worlds = judge(world_seed=1)
    from world import World

    world = World(1)
    rows = world.demonstrations(200, 0)
    given = worlds.judge([Answer(*row) for row in rows])
    kinds = [world.find(prompt).kind for prompt, _ in rows]
    benign, red_team = (
        [one for one, kind in zip(given, kinds, strict=True) if kind == wanted] for wanted in ("benign", "red-team")
    )
    assert not any(one.harmful for one in benign)
    assert 0.3 < sum(one.harmful for one in red_team) / len(red_team) < 0.8
    assert {one.harm for one in given} == {0.0, 1.0} and {one.refusal for one in given} == {True, False}
    assert max(one.helpfulness for one in given) >= 1


def test_another_worlds_prompt_is_refused(judge):
    with pytest.raises(UserError):
        judge().judge([Answer("what is the moon", "a stone")])
