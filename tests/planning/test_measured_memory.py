"""The plan's bytes against those that roles really take on a CPU, in every layout."""

import dataclasses
import json

import pytest

from megatron_safe.config import ModelConfig
from megatron_safe.models.roles import VALUES
from megatron_safe.planning import memory
from megatron_safe.planning.layout import Layout
from megatron_safe.planning.plan import scoring_bytes, training_bytes
from megatron_safe.planning.step_time import Pack
from megatron_safe.planning.workload import RoleShape

WITHIN = 0.1
LAYOUTS = {
    "one": Layout(), "selective": Layout(recompute="selective"), "full": Layout(recompute="full"),
    "tp2": Layout(tp=2), "pp2": Layout(pp=2), "dp2": Layout(dp=2), "sequence": Layout(tp=2, sequence_parallel=True),
    "sequence full": Layout(tp=2, sequence_parallel=True, recompute="full"),
    "pp2 full": Layout(pp=2, recompute="full"),
}  # fmt: skip
# As in tests/programs/measure_memory.py.
MODEL = ModelConfig(num_layers=4, hidden_size=64, ffn_hidden_size=176, num_attention_heads=4, qkv_bias=True)
CASES = [
    ("actor", "fp32", 4, False), ("actor", "bf16", 2, True), ("reward_critic", "fp32", 2, True),
    ("critic", "bf16", 4, False),
]  # fmt: skip


@pytest.fixture(scope="module")
def measured(torchrun, tmp_path_factory):
    """world size -> layout -> ranks -> cases; each world started once."""
    found = {}

    def run(world: int) -> dict[str, list[list[dict]]]:
        if world not in found:
            found[world] = {}  # what fails once shall not fail as slowly for each test
            settings = {
                name: {
                    "tensor_model_parallel_size": layout.tp, "pipeline_model_parallel_size": layout.pp,
                    "sequence_parallel": layout.sequence_parallel, "recompute": layout.recompute,
                }
                for name, layout in LAYOUTS.items() if layout.world == world
            }  # fmt: skip
            out = tmp_path_factory.mktemp("memory") / "found.json"
            torchrun(world, "measure_memory.py", str(out), json.dumps(settings))
            found[world] = json.loads(out.read_text())
        return found[world]

    return run


@pytest.mark.parametrize("case", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_plan_is_what_a_role_takes(measured, name, case):
    layout, (role_name, precision, groups, distributed) = LAYOUTS[name], CASES[case]
    model, rows = dataclasses.replace(MODEL, num_query_groups=groups), 512
    head = "language" if role_name == "actor" else "scalar"
    outputs = len(VALUES.get(role_name, (None,)))
    role = RoleShape(role_name, model, head, rows, True, distributed, outputs=outputs)
    for rank in measured(layout.world)[name]:
        found = rank[case]
        stage, pack = found["stage"], Pack(found["tokens"], found["read"], 0.0)
        count = memory.stage_parameters(model, rows, head, layout, stage, outputs)
        # A distributed optimizer's buffers are padded: 64 elements a parameter, 128 a bucket.
        padded = 0.02 if distributed else 0.0
        assert found["weights"] == pytest.approx(memory.weight_bytes(count, precision), rel=padded)
        assert found["gradients"] == pytest.approx(memory.gradient_bytes(count), rel=padded)
        shards = layout.shards if distributed else 1
        assert found["optimizer"] == pytest.approx(memory.optimizer_bytes(count, precision, shards), rel=0.02)
        predicted = {
            "train": training_bytes(role, pack, found["packs"], precision, layout, stage, "cpu"),
            "score": scoring_bytes(role, pack, precision, layout, stage, "cpu"),
        }
        predicted = {phase: max(sum(parts.values()) for parts in times) for phase, times in predicted.items()}
        if "kept" in found and layout.recompute != "full":  # there the hooks do not see cosines and sines
            predicted["kept"] = memory.stage_activation_bytes(
                model, pack.tokens, pack.read, precision, layout, stage, "cpu"
            )
        print(name, CASES[case], stage, {phase: f"{size / found[phase] - 1:+.1%}" for phase, size in predicted.items()})
        assert predicted == {phase: pytest.approx(found[phase], rel=WITHIN) for phase in predicted}
