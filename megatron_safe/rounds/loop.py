"""The loop of the paper's three rounds over the stages of `megatron-safe`."""

import dataclasses
import gc
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_safe.config import ModelConfig, RoundConfig, RoundsConfig, to_dict
from megatron_safe.data.mixture import read
from megatron_safe.data.records import Prompt
from megatron_safe.data.sources import read_prompts
from megatron_safe.data.tokenizer import load_tokenizer
from megatron_safe.errors import UserError
from megatron_safe.evaluation import evaluate, stages
from megatron_safe.rounds.annotators import annotate
from megatron_safe.rounds.checks import check_begun, check_job, check_labels, check_useful
from megatron_safe.rounds.pairs import draw, pair_rows, read_json_lines, split
from megatron_safe.rounds.progress import Progress
from megatron_safe.rounds.settings import stage_config
from megatron_safe.runtime import Runtime
from megatron_safe.training.run import check_stage, write_config

MODELS = ("reward", "cost")


def run(config: RoundsConfig, runtime: Runtime, parse: Callable, run_stage: Callable) -> None:
    """Everything that is not finished in OUT, one folder for each stage.

    Args:
        parse, run_stage: the command line's.

    Raises:
        UserError: for what is wrong in any round's settings, before the first stage starts.
        Waiting: until people have labelled this round's pairs.
    """
    loop = Loop(config, runtime, parse, run_stage)
    loop.train()
    if config.evaluate is not None:
        loop.evaluate()


class Loop:
    """The folder, what is finished in it, and the newest of every model."""

    def __init__(self, config: RoundsConfig, runtime: Runtime, parse: Callable, run_stage: Callable):
        self.config, self.runtime, self.parse, self.run_stage = config, runtime, parse, run_stage
        self.out = Path(config.run.out)
        check_stage(self.out, "rounds")
        self.progress = Progress(self.out, runtime)
        if self.progress and config.run.resume == "no":
            raise UserError(f"run.out {self.out}: holds a job already; choose another folder, or --run.resume auto")
        self.policies: dict[str, Path] = {}
        self.models = {"reward": config.reward_model, "cost": config.cost_model}
        self.labels: list[str] = []
        self.attacks: list[str] = []  # the newest pool of attacks, once there is one

    def train(self) -> None:
        """SFT and all rounds. Raises UserError and Waiting as `run`."""
        self.check()
        first = policy = self.first_policy()
        for number, settings in enumerate(self.config.rounds, start=1):
            policy = self.round(number, settings, policy, first)

    def check(self) -> None:
        """What can be wrong in any round, and then the claim of the folder. Raises UserError."""
        check_job(self)
        self.tokenizer = load_tokenizer(self.config.tokenizer.path, self.config.tokenizer.template)
        self.runtime.on_main(self.claim)

    def claim(self) -> None:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            write_config(self.out, "rounds", self.config)
        except OSError as error:
            raise UserError(f"run.out {self.out}: cannot be written: {error}") from error

    def first_policy(self) -> Path:
        """SFT: each part starts from the one before."""
        policy = self.config.start
        for name, settings in self.config.sft.items():
            start = {"model": {"checkpoint": str(policy)}} if policy else {}
            policy = self.stage("sft", name, f"sft.{name}", settings, start)
        self.policies["SFT" if self.config.sft else "start"] = Path(policy)
        return Path(policy)

    def round(self, number: int, settings: RoundConfig, policy: Path, first: Path) -> Path:
        """One round; the policy that it made."""
        place = f"round{number}"
        if settings.red_team is not None:
            folder = self.stage(
                "red-team", f"{place}/red-team", f"rounds[{number - 1}].red_team", self.config.red_team,
                settings.red_team,
                {"model": {"checkpoint": str(policy)}, "cost_model": {"checkpoint": str(self.models["cost"])}},
                *([{"red_team": {"pool": self.attacks}}] if self.attacks else []),  # which began with the user's own
            )  # fmt: skip
            found = folder / "prompts.jsonl"
            self.attacks = [str(found)] if found.stat().st_size else []
        learnt, held_out = self.label(number, settings, policy, first)
        self.labels.append(learnt)
        for which in MODELS:
            self.models[which] = self.stage(
                which, f"{place}/{which}", f"rounds[{number - 1}].{which}", getattr(self.config, which),
                getattr(settings, which),
                {
                    "model": {"checkpoint": str(self.models[which] or first)},
                    "data": {"train": list(self.labels), "eval": [held_out]},
                },
            )  # fmt: skip
        self.policies[f"round {number}"] = self.stage(
            "ppo-lag", f"{place}/ppo", f"rounds[{number - 1}].ppo", self.config.ppo, settings.ppo,
            self.ppo_inputs(number, settings, policy, self.models),
        )  # fmt: skip
        return self.policies[f"round {number}"]

    def ppo_inputs(
        self, number: int, settings: RoundConfig, policy: Path, models: Mapping[str, str | Path]
    ) -> dict[str, Any]:
        """What PPO-Lag takes from the stages before it."""
        inputs: dict[str, Any] = {
            "actor": {"checkpoint": str(policy)},
            "reward_model": {"checkpoint": str(models["reward"])},
            "cost_model": {"checkpoint": str(models["cost"])},
        }
        if self.attacks:
            given = self.stage_config("ppo-lag", f"rounds[{number - 1}].ppo", self.config.ppo, settings.ppo)
            inputs["data"] = {"prompts": [*given.data.prompts, *self.attacks]}
        if self.config.threshold_share is not None:
            safe_score = json.loads((Path(models["cost"]) / "eval.json").read_text())["safe_score"]
            inputs["lagrange"] = {"threshold": self.config.threshold_share * safe_score}
        return inputs

    def label(self, number: int, settings: RoundConfig, policy: Path, first: Path) -> tuple[str, str]:
        """Pairs of answers, half of them (`against_first`) against the first policy's, labelled: the files to learn
        from and to measure on."""
        folder, name = self.out / f"round{number}", f"round{number}/labels"
        learnt, held_out = folder / "train.jsonl", folder / "held_out.jsonl"
        if name not in self.progress:
            seed = 1000 * (self.config.run.seed + 1) + 10 * number
            pairs = self.sample(folder / "pairs.jsonl", number, settings, policy, first, seed)
            rows = annotate(self.config.annotator, pairs, folder / "annotation", seed + 4, self.runtime)
            place = f"{folder}: labels of {self.config.annotator.kind}"
            check_labels(rows, place)
            parts = split(rows, self.config.held_out)
            for part, name_of in zip(parts, ("to learn from", "held out"), strict=True):
                check_useful(part, f"{place}, {name_of}", self.config.threshold_share is not None)
            for path, part in zip((learnt, held_out), parts, strict=True):
                stages.write_rows(path, part, self.runtime)
            self.progress.add(name)
        return str(learnt), str(held_out)

    def sample(
        self, path: Path, number: int, settings: RoundConfig, policy: Path, first: Path, seed: int
    ) -> list[dict[str, Any]]:
        """Two answers to each of the round's prompts, neither labelled yet."""
        name = f"round{number}/pairs"
        if name not in self.progress:
            config = self.stage_config("generate", "generate", self.config.generate)
            attacks = read_prompts(self.attacks) if self.attacks else []
            prompts = draw([*self.prompts(number, settings), *attacks], settings.pairs, seed)
            alone = len(prompts) - int(len(prompts) * self.config.against_first)
            self.say(f"round {number}: sampling {len(prompts)} pairs of answers")

            def ask(of: Path, asked: list, seed: int) -> list:
                seeded = dataclasses.replace(config, run=dataclasses.replace(config.run, seed=seed))
                model = ModelConfig(checkpoint=str(of))
                return stages.answer(seeded, model, asked, self.tokenizer, self.runtime) if asked else []

            one = ask(policy, prompts, seed + 1)
            other = ask(policy, prompts[:alone], seed + 2) + ask(first, prompts[alone:], seed + 3)
            path.parent.mkdir(parents=True, exist_ok=True)
            stages.write_rows(path, pair_rows(one, other), self.runtime)
            self.progress.add(name)
        return read_json_lines(path)

    def prompts(self, number: int, settings: RoundConfig) -> list[Prompt]:
        """What a round asks. Raises UserError for bad entries or files."""
        name = f"rounds[{number - 1}].prompts"
        return read("prompts", name, settings.prompts, weighted=False, say=self.runtime.print).records

    def evaluate(self, facts: Mapping[str, Any] | None = None) -> None:
        """The report on all policies, with what the rounds' models and multipliers reached; `facts` join it."""
        rounds = [f"round{number}" for number, _ in enumerate(self.config.rounds, start=1)]
        found = {
            which: [json.loads((self.out / name / which / "eval.json").read_text()) for name in rounds]
            for which in MODELS
        }
        runs = [(f"round {i}", self.out / name / "ppo" / "metrics.jsonl") for i, name in enumerate(rounds, start=1)]
        last = json.loads(runs[-1][1].read_text().splitlines()[-1])
        reached = {
            "seed": self.config.run.seed,  # the job's, not the one that the report's answers are drawn with
            "reward_model_accuracy": [one["accuracy"] for one in found["reward"]],
            "cost_model_accuracy": [one["accuracy"] for one in found["cost"]],
            "cost_model_sign_accuracy": [one.get("sign_accuracy") for one in found["cost"]],
            "lambda_final": last["lambda"],
        }
        self.judge(self.policies, self.models, self.out / "evaluate", runs, reached | dict(facts or {}))

    def judge(
        self,
        policies: Mapping[str, Path],
        models: Mapping[str, str | Path],
        out: Path,
        runs: Sequence[tuple[str, Path]] = (),
        facts: Mapping[str, Any] | None = None,
    ) -> dict:
        """The stage `evaluate` on these policies with these reward and cost models, into `out`; its summary."""
        inputs: dict[str, Any] = {f"{which}_model": {"checkpoint": str(path)} for which, path in models.items()}
        inputs["policies"] = {name: str(path) for name, path in policies.items()}
        config = self.stage_config("evaluate", "evaluate", self.config.evaluate, inputs)
        config.run.out, config.run.resume = str(out), "auto"
        self.say(f"judging {', '.join(policies)}")
        return evaluate.run(config, self.runtime, runs, facts, self.progress.started)

    # Stages.

    def stage(self, stage: str, name: str, place: str, *settings: Mapping) -> Path:
        """Run a stage in OUT/name unless it is finished; its folder."""
        folder = self.out / name
        config = self.stage_config(stage, place, *settings)
        config.run.out, config.run.resume = str(folder), "auto"
        if (folder / "config.yaml").exists():
            check_begun(folder, to_dict(config))
        if name not in self.progress:
            self.say(f"{stage} -> {folder}")
            self.runtime.barrier()  # every rank has looked at the folder
            self.run_stage(stage, config, self.runtime)
            gc.collect()  # Megatron's modules refer to each other in circles, and the next stage needs their room
            torch.cuda.empty_cache()
            self.progress.add(name)
        return folder

    def stage_config(self, stage: str, place: str, *settings: Mapping):
        """A stage's config from mappings, later ones over earlier ones. Raises UserError naming `place`."""
        return stage_config(self.config, stage, place, settings, self.parse)

    def say(self, text: str) -> None:
        self.runtime.print(f"[{time.monotonic() - self.progress.started:4.0f} s] {text}")
