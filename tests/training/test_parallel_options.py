"""Every option of `parallel` and of a distributed optimizer trains as the plain path in one process does: the same
losses, gradient norms, scores, before and after a resume."""

import json

import pytest
import torch
from megatron.core.transformer.mlp import MLP
from metrics_close import assert_metrics_close

from megatron_safe.config import ModelConfig, ParallelConfig
from megatron_safe.models.attention import PackedCoreAttention
from megatron_safe.models.llama import build
from megatron_safe.models.packing import Sequences, pack
from megatron_safe.runtime import start

# Biases, norms of heads and a vocabulary matrix of its own each have their gradient reduced in another way.
PLAIN = {
    "sft": ("sft", ["--model.num_layers=4"]),
    "rich": (
        "sft",
        ["--model.num_layers=4", "--model.qkv_bias=true", "--model.qk_norm=true", "--model.tie_embeddings=false"],
    ),
    "reward": ("reward", []),
    "cost": ("cost", []),
    "ppo-lag": ("ppo-lag", []),
    "shared": ("ppo-lag", ["--critics=shared", "--ppo.mini_batch_size=16"]),
}
"""What runs in one process, and is compared with."""


def parallel(**settings) -> list[str]:
    return [f"--parallel.{name}={value}" for name, value in settings.items()]


TP2 = parallel(tensor_model_parallel_size=2)
SP = [*TP2, *parallel(sequence_parallel="true")]
PP2 = parallel(pipeline_model_parallel_size=2)
CP2 = parallel(context_parallel_size=2)
VPP2 = [*PP2, *parallel(virtual_pipeline_model_parallel_size=2)]


def overlap(*sections: str) -> list[str]:
    names = ("distributed", "overlap_grad_reduce", "overlap_param_gather")
    return [f"--{section}.{name}=true" for section in sections for name in names]


OVERLAP = overlap("optimizer")
OPTIONS = {
    1: {
        "sft selective": parallel(recompute="selective"),
        "reward full": parallel(recompute="full"),
    },
    2: {
        "sft sequence": SP,
        "rich sequence full": [*SP, *parallel(recompute="full")],
        "reward sequence selective": [*SP, *parallel(recompute="selective")],
        "sft overlap": ["--optimizer.overlap_grad_reduce=true"],
        "rich distributed overlap": OVERLAP,
        "reward distributed overlap": OVERLAP,
        "sft interleaved": VPP2,
        "reward interleaved distributed overlap": [*VPP2, *OVERLAP],
        "ppo-lag interleaved": VPP2,
        "sft context": CP2,
        "reward context": [*CP2, *parallel(recompute="full")],
        "ppo-lag context": CP2,
        "ppo-lag distributed overlap": overlap("actor_optimizer", "critic_optimizer"),
    },
    4: {
        "reward sequence pipeline full": [*SP, *PP2, *parallel(recompute="full")],
        "rich interleaved sequence distributed": [*VPP2, *SP, "--optimizer.distributed=true"],
        "sft interleaved data overlap": [*VPP2, *OVERLAP],
        "rich context sequence": [*CP2, *SP],
        "reward context pipeline": [*CP2, *PP2],
        "sft context distributed overlap": [*CP2, *OVERLAP],
        "ppo-lag context sequence": [*CP2, *SP],
        "shared sequence pipeline full distributed": [
            *SP, *PP2, *parallel(recompute="full"), "--critic_optimizer.distributed=true",
        ],
        "shared interleaved selective distributed overlap": [
            *VPP2, *parallel(recompute="selective"), *overlap("actor_optimizer", "critic_optimizer"),
        ],
    },
}  # fmt: skip
"""Processes -> {plain run and options: arguments}."""
RESUMED = [
    "rich distributed overlap", "sft interleaved", "rich interleaved sequence distributed",
    "shared interleaved selective distributed overlap",
]  # fmt: skip
"""Runs that are also stopped half-way and go on in a process group of their own."""


@pytest.fixture(scope="module")
def launch(project, torchrun, tmp_path_factory):
    """(processes, {folder: (stage, arguments)}, models) -> where they ran, one after the other."""

    def run(processes, runs, models):
        root = tmp_path_factory.mktemp(f"processes_{processes}")
        plan = [
            [stage, *project.arguments(stage, root / folder, "one", *more, models=models or root)]
            for folder, stage, more in runs
        ]
        (root / "plan.json").write_text(json.dumps(plan))
        torchrun(processes, "run_stages_anew.py", str(root / "plan.json"))
        return root

    return run


def planned(processes: int):
    """(folder, stage, arguments) of everything that so many processes run."""
    for name, more in OPTIONS[processes].items():
        stage, settings = PLAIN[name.split()[0]]
        yield name, stage, [*settings, *more]
        if name in RESUMED:
            half = 1 if stage == "ppo-lag" else 2
            yield f"resumed {name}", stage, [*settings, *more, f"--run.stop_after={half}"]
            yield f"resumed {name}", stage, [*settings, *more, "--run.resume=auto"]


@pytest.fixture(scope="module")
def plain(launch):
    return launch(1, [*((name, *run) for name, run in PLAIN.items()), *planned(1)], None)


@pytest.fixture(scope="module")
def finished(launch, plain):
    """processes -> the folder with its runs, each number of processes started at its first use, once."""
    folders = {1: plain}

    def run(processes):
        if processes not in folders:
            folders[processes] = None  # what fails once shall not fail as slowly for each test
            folders[processes] = launch(processes, list(planned(processes)), plain)
        return folders[processes]

    return run


EVERY = [(count, name) for count, runs in OPTIONS.items() for name in runs]


@pytest.mark.parametrize("processes, name", EVERY)
def test_an_option_changes_no_number(finished, plain, metrics_of, processes, name):
    of = name.split()[0]
    assert_metrics_close(metrics_of(finished(processes) / name), metrics_of(plain / of))
    if of == "reward":
        folders = finished(processes) / name, plain / of
        found, wanted = (json.loads((folder / "eval.json").read_text()) for folder in folders)
        assert_metrics_close([found], [wanted])


@pytest.mark.parametrize("processes, name", [each for each in EVERY if each[1] in RESUMED])
def test_it_goes_on_where_it_was_stopped(finished, metrics_of, processes, name):
    assert_metrics_close(metrics_of(finished(processes) / f"resumed {name}"), metrics_of(finished(processes) / name))


@pytest.mark.parametrize("kind, attentions, mlps", [("none", 3, 3), ("selective", 6, 3), ("full", 6, 6)])
def test_recompute_computes_again_what_it_says(kind, attentions, mlps, monkeypatch):
    calls = {PackedCoreAttention: 0, MLP: 0}
    for each in calls:

        def counted(self, *args, plain=each.forward, each=each, **kwargs):
            calls[each] += 1
            return plain(self, *args, **kwargs)

        monkeypatch.setattr(each, "forward", counted)
    model = ModelConfig(num_layers=3, hidden_size=16, ffn_hidden_size=16, max_sequence_length=8, vocab_multiple=8)
    rows = Sequences.to_last(torch.arange(12).view(2, 6), torch.tensor([6, 4]))
    with start(ParallelConfig(recompute=kind), 0) as runtime:
        build(model, runtime, "scalar", 16, "fp32", 0)(*pack(rows, 100)).sum().backward()
    assert (calls[PackedCoreAttention], calls[MLP]) == (attentions, mlps)
