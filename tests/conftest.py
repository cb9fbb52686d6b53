"""A tiny project of made-up rows, and the stages run on it in every layout, each layout started once."""

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_safe.config import ParallelConfig
from megatron_safe.runtime import start

if not torch.cuda.is_available():
    # Triton's interpreter stands in for a GPU. Here, because triton looks once: when the first kernel is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# How long an example takes says how busy the machine is, and nothing about the law.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# transformers, which these compare with, needs Python 3.11.
collect_ignore = [] if sys.version_info >= (3, 11) else ["huggingface"]
PROGRAMS = Path(__file__).parent / "programs"
LAYOUTS = {
    "one": (1, 1, 1), "tp2": (2, 1, 1), "pp2": (1, 2, 1), "dp2": (1, 1, 2), "tp2pp2": (2, 2, 1), "tp4": (4, 1, 1),
    "pp4": (1, 4, 1),
}  # fmt: skip
"""(tensor, pipeline, data) parallel sizes."""
SECONDS = 300  # the hard limit of one start; a busy machine needs a tenth of it
VARIANTS = {
    "sft": ("sft", 2, []),
    "reward": ("reward", 3, []),
    "ppo-lag": ("ppo-lag", 1, []),
    "bf16": ("sft", 2, ["--batch.precision=bf16"]),
    "distributed": ("sft", 2, ["--optimizer.distributed=true"]),
    # Stopped before the actor's first optimizer step.
    "warmup": ("ppo-lag", 1, ["--ppo.critic_warmup_steps=1"]),
    "warmup-distributed": (
        "ppo-lag", 1,
        ["--ppo.critic_warmup_steps=1", "--actor_optimizer.distributed=true", "--critic_optimizer.distributed=true"],
    ),
}  # fmt: skip
"""Runs that are also stopped and resumed: the stage, after which step, and settings of their own."""
STOPPED = {
    "one": ("sft", "reward", "ppo-lag", "bf16", "warmup"),
    "tp2": ("sft", "reward", "ppo-lag", "distributed"),
    "dp2": ("distributed", "warmup-distributed"),
}
EPS = 1e-5  # Adam's first step is g / (|g| + eps): where g is no more than rounding, a smaller eps blows it up to 1
WORDS = [f"w{i}" for i in range(38)]


def torchrun(processes: int, program: str, *arguments: str) -> None:
    """Run a program of programs/ to its end, which must be a good one."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
         str(PROGRAMS / program), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=SECONDS, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:]


@pytest.fixture(scope="module")
def runtime():
    """One process, started in this one."""
    with start(ParallelConfig(), 0) as runtime:
        yield runtime


@pytest.fixture(scope="session", name="torchrun")
def torchrun_fixture():
    return torchrun


def launch(layout: str, runs: list[tuple[str, list[str]]], plan: Path, seed: int = 0) -> list[str]:
    """Run stages in one process group of a layout; what each ended with, "" where well."""
    tp, pp, dp = LAYOUTS[layout]
    plan.write_text(json.dumps({"tp": tp, "pp": pp, "seed": seed, "runs": runs}))
    torchrun(tp * pp * dp, "run_stages.py", str(plan))
    return json.loads(plan.with_suffix(".out.json").read_text())


@pytest.fixture(scope="session")
def metrics_of():
    """run folder -> the steps it logged, without what depends on the machine."""

    def read(folder: Path) -> list[dict]:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        machine = ("seconds/", "tokens_per_second/", "peak_memory")
        return [{name: value for name, value in line.items() if not name.startswith(machine)} for line in lines]

    return read


@dataclass(frozen=True)
class Project:
    """A tokenizer of 43 tokens, data files, and the stages' settings."""

    data: Path

    def arguments(self, stage: str, out: Path, layout: str, *more: str, models: Path | None = None) -> list[str]:
        """Of a stage that writes `out`, starting from the runs under `models`."""
        model = [
            "--model.hidden_size=32", "--model.ffn_hidden_size=48", "--model.num_attention_heads=4",
            "--model.num_query_groups=2", "--model.max_sequence_length=40", "--model.tie_embeddings=true",
            "--model.vocab_multiple=32", "--model.init_std=0.2",
        ]  # fmt: skip
        # Rows have 5 to 22 tokens, so that every layout has several packs.
        batch = [
            "--batch.global_batch_size=8", "--batch.max_length=24", "--batch.max_tokens_per_micro_batch=36",
        ]  # fmt: skip
        rollout = ["--rollout.max_new_tokens=10", "--rollout.max_prompt_length=12"]
        prompts = f"--data.prompts=[{self.data / 'prompts.jsonl'}]"
        own = {
            "sft": [
                *model, *batch, f"--data.train=[{self.data / 'demonstrations.jsonl'}]", "--training.steps=4",
                "--optimizer.lr=1e-2", "--optimizer.warmup_steps=1", "--optimizer.weight_decay=0.1",
                f"--optimizer.eps={EPS}",
            ],
            "reward": [
                f"--model.checkpoint={models}/sft", *batch, f"--data.train=[{self.data / 'comparisons.jsonl'}]",
                f"--data.eval=[{self.data / 'comparisons.jsonl'}]", "--training.steps=4", "--optimizer.lr=1e-2",
                f"--optimizer.eps={EPS}",
            ],
            "ppo-lag": [
                f"--actor.checkpoint={models}/sft", f"--reward_model.checkpoint={models}/reward",
                f"--cost_model.checkpoint={models}/cost", prompts, *rollout, "--ppo.steps=2",
                f"--data.ptx=[{self.data / 'demonstrations.jsonl'}]", "--ppo.ptx_coeff=0.5",
                "--ppo.rollout_batch_size=16", "--ppo.mini_batch_size=8",
                "--ppo.max_tokens_per_micro_batch=36", "--ppo.max_tokens_per_score_micro_batch=60",
                "--ppo.whiten_advantages=true", "--ppo.red_team_share=0.5",
                "--ppo.missing_eos_penalty=0.5", "--ppo.kl_coeff=0.1", "--lagrange.prompts=red-team",
                "--lagrange.lambda_lr=0.5", "--lagrange.episode_cost_window=12",
                "--actor_optimizer.lr=5e-3", f"--actor_optimizer.eps={EPS}",
                "--critic_optimizer.lr=5e-3", f"--critic_optimizer.eps={EPS}",
            ],
            "generate": [
                f"--model.checkpoint={models}/ppo-lag", prompts, *rollout, "--data.batch_size=8",
                "--data.samples_per_prompt=2",
            ],
        }  # fmt: skip
        own["cost"] = own["reward"]
        tp, pp, _ = LAYOUTS[layout]
        return [
            f"--run.out={out}", "--run.tensorboard=false", f"--tokenizer.path={self.data / 'tokenizer'}",
            "--tokenizer.template=ask {prompt} answer", f"--parallel.tensor_model_parallel_size={tp}",
            f"--parallel.pipeline_model_parallel_size={pp}", *own[stage], *more,
        ]  # fmt: skip


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> Project:
    data = tmp_path_factory.mktemp("project")
    vocab = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "ask", "answer", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    (data / "tokenizer").mkdir()
    tokenizer.save(str(data / "tokenizer" / "tokenizer.json"))

    draw = random.Random(7)

    def text(least: int, most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    def bit() -> int:
        return draw.randint(0, 1)

    rows = {
        "demonstrations": [{"prompt": text(1, 6), "response": text(1, 8)} for _ in range(30)],
        "comparisons": [
            {
                "prompt": text(1, 6), "response_0": text(0, 8), "response_1": text(1, 8), "better_response_id": bit(),
                "safer_response_id": bit(), "is_response_0_safe": bool(bit()), "is_response_1_safe": bool(bit()),
            }
            for _ in range(30)
        ],
        "prompts": [{"prompt": text(1, 9), "red_team": i % 3 == 0} for i in range(21)],
    }  # fmt: skip
    for name, content in rows.items():
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return Project(data)


@pytest.fixture(scope="session")
def finished(project, tmp_path_factory):
    """layout -> the folder with one run of every stage (named after it) in that layout, and runs stopped on the way
    (`stopped/...`). Each layout is started at its first use, once."""
    folders: dict[str, Path] = {}

    def run(layout: str) -> Path:
        if layout not in folders:
            # Kept before it is run: what fails once shall not fail as slowly for each test.
            folder = folders[layout] = tmp_path_factory.mktemp(layout)

            def stage(name: str, out: str, *more: str):
                return name, project.arguments(name, folder / out, layout, *more, models=folder)

            runs = [stage(name, name) for name in ("sft", "reward", "cost", "ppo-lag")]
            runs += [
                stage(
                    "ppo-lag", "ppo-lag-token", "--ppo.loss_reduction=token", "--lagrange.prompts=all", "--ppo.steps=1"
                ),
                stage("generate", "generate"),
            ]
            for name in STOPPED.get(layout, ()):
                of, after, more = VARIANTS[name]
                if name != of:  # the plain ones are there already
                    runs.append(stage(of, name, *more))
                runs.append(stage(of, f"stopped/{name}", *more, f"--run.stop_after={after}"))
            assert launch(layout, runs, folder / "plan.json") == [""] * len(runs)
        return folders[layout]

    return run


@pytest.fixture(scope="session")
def resumed(project, finished, tmp_path_factory):
    """(layout that was stopped, layout that goes on) -> the folder with all of its stopped runs, at their end: from a
    fresh process group, as after a crash."""
    folders: dict[tuple[str, str], Path] = {}

    def run(before: str, after: str) -> Path:
        if (before, after) not in folders:
            folder = folders[before, after] = tmp_path_factory.mktemp(f"{before}_then_{after}")
            runs = []
            for name in STOPPED[before]:
                shutil.copytree(finished(before) / "stopped" / name, folder / name)
                stage, _, more = VARIANTS[name]
                arguments = project.arguments(
                    stage, folder / name, after, "--run.resume=auto", *more, models=finished(before)
                )
                runs.append((stage, arguments))
            assert launch(after, runs, folder / "plan.json") == [""] * len(runs)
        return folders[before, after]

    return run
