"""What was saved at TP 2 x PP 2 goes on at TP 4, at PP 4 and in one process, optimizer state and all, and answers."""

import json
import math
import shutil

import pytest

PROCESSES = {"tp2pp2": 4, "tp4": 4, "pp4": 4, "one": 1}
# Every layout divides these; a bias and norms of heads are sharded (or not) in their own ways.
MODEL = [
    "--model.num_layers=4", "--model.num_query_groups=4", "--model.qkv_bias=true", "--model.qk_norm=true",
    "--model.head_dim=6", "--training.steps=5",
]  # fmt: skip
RUNS = {"plain": [], "distributed": ["--optimizer.distributed=true"]}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("tp2pp2")


@pytest.fixture(scope="module")
def start(project, torchrun, root, tmp_path_factory):
    def start(layout, runs) -> None:
        """runs: (folder, further arguments) of SFT, one after the other in one process group; then answers of what was
        trained at TP 2 x PP 2."""
        sizes = {"one": (1, 1), "tp2pp2": (2, 2), "tp4": (4, 1), "pp4": (1, 4)}[layout]
        plan = tmp_path_factory.mktemp("plan") / "plan.json"
        stages = [("sft", project.arguments("sft", folder, layout, *MODEL, *more)) for folder, more in runs]
        answers = [f"--run.out={runs[0][0].parent / 'answers'}", f"--model.checkpoint={root / 'plain'}"]
        stages.append(("generate", project.arguments("generate", runs[0][0], layout, *answers)))
        plan.write_text(json.dumps({"tp": sizes[0], "pp": sizes[1], "seed": 0, "runs": stages}))
        torchrun(PROCESSES[layout], "run_stages.py", str(plan))
        assert json.loads(plan.with_suffix(".out.json").read_text()) == [""] * len(stages)

    return start


@pytest.fixture(scope="module")
def saved(start, root):
    """A folder with whole runs at TP 2 x PP 2, and under stopped/ the same ones after two steps."""
    whole = [(root / name, more) for name, more in RUNS.items()]
    stopped = [(root / "stopped" / name, [*more, "--run.stop_after=2"]) for name, more in RUNS.items()]
    start("tp2pp2", whole + stopped)
    return root


@pytest.mark.parametrize("layout", ["tp4", "pp4", "one"])
def test_it_goes_on_with_the_same_losses(saved, start, metrics_of, tmp_path, layout):
    for name in RUNS:
        shutil.copytree(saved / "stopped" / name, tmp_path / name)
    start(layout, [(tmp_path / name, [*more, "--run.resume=auto"]) for name, more in RUNS.items()])
    assert (tmp_path / "answers" / "answers.jsonl").read_text() == (saved / "answers" / "answers.jsonl").read_text()
    for name in RUNS:
        found, whole = metrics_of(tmp_path / name), metrics_of(saved / name)
        assert [line["step"] for line in found] == [1, 2, 3, 4, 5] == [line["step"] for line in whole]
        for one, other in zip(found, whole, strict=True):  # the tolerance is that of test_layouts.py
            wrong = {
                key: (one[key], other[key])
                for key in other
                if not math.isclose(one[key], other[key], rel_tol=2e-5, abs_tol=3e-6)
            }
            assert not wrong, f"{name}, step {one['step']}: {wrong}"
