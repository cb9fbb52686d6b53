"""The quickstart: a tiny Llama through SFT, reward and cost model and three rounds of PPO-Lag, as in the paper.

Start it with run.sh. Every stage runs through the same functions as `megatron-safe STAGE`, one after another in one
Megatron process group. What the tiny world (world.py) adds is what people do in the paper: it asks, it labels, and at
the end it judges, by rules that no model here was trained on directly (judge.py).
"""

import argparse
import dataclasses
import json
import os
import random
import sys
import time
from pathlib import Path

from annotators import annotate, write_comparisons
from judge import judge
from world import World, WorldPrompt, write_demonstrations, write_jsonl, write_prompts, write_tokenizer

from megatron_safe.cli import parse, run_stage
from megatron_safe.config import ModelConfig, ParallelConfig, RolloutConfig
from megatron_safe.data.records import Prompt
from megatron_safe.data.tokenizer import load_tokenizer
from megatron_safe.errors import UserError
from megatron_safe.evaluation.answers import Answer, generate_answers, score_answers
from megatron_safe.evaluation.judges import Judgement
from megatron_safe.evaluation.report import format_table, write_report
from megatron_safe.evaluation.summary import compare_models
from megatron_safe.models.roles import Role
from megatron_safe.runtime import Runtime, start
from megatron_safe.training.setup import make_role

CONFIGS = Path(__file__).parent / "configs"
LAYOUTS = {"single": (1, 1, 1), "tp2": (2, 1, 1), "pp2": (1, 2, 1), "dp2": (1, 1, 2), "tp2pp2": (2, 2, 1)}
ROUNDS = (1, 2, 3)
TEMPLATE = "USER: {prompt} ASSISTANT:"
ROLLOUT = RolloutConfig(max_prompt_length=40, max_new_tokens=22)
SFT_STEPS = {"pretrain": 210, "sft": 310}
PAIRS = {1: 5900, 2: 8800, 3: 8500}
STEPS = {"reward": {1: 700, 2: 489, 3: 489}, "cost": {1: 300, 2: 210, 3: 210}}
HELD_OUT_PAIRS = 400
EVALUATION_PROMPTS = 1000
SHAPING_COEFFS = (0.01, 0.5, 1.0, 2.0, 5.0, 10.0, 100.0)


class Quickstart:
    """The folder, the world and the layout that all steps share."""

    def __init__(self, arguments: argparse.Namespace, runtime: Runtime):
        self.arguments = arguments
        self.runtime = runtime
        self.out = Path(arguments.out)
        self.data = self.out / "data"
        self.seed = arguments.seed
        self.world = World(arguments.world_seed)
        self.scale = arguments.scale
        self.started = time.monotonic()
        if runtime.is_main:
            write_tokenizer(self.world, self.data / "tokenizer")
        runtime.barrier()
        self.tokenizer = load_tokenizer(self.data / "tokenizer")

    def steps(self, full: int) -> int:
        return max(2, int(full * self.scale))

    def say(self, text: str) -> None:
        self.runtime.print(f"[{time.monotonic() - self.started:4.0f} s] {text}")

    def write(self, writer, name: str, rows) -> str:
        path = self.data / name
        if self.runtime.is_main:
            writer(path, rows)
        self.runtime.barrier()
        return str(path)

    def stage(self, stage: str, out: str, *overrides: str) -> Path:
        """Run a stage with the config in configs/ and these overrides; its run folder."""
        tp, pp, _ = LAYOUTS[self.arguments.layout]
        file = {"sft": "sft", "reward": "preference", "cost": "preference"}.get(stage, "ppo")
        folder = self.out / out
        self.say(f"{stage} -> {folder}")
        config = parse(
            stage,
            [
                f"--config={CONFIGS / file}.yaml",
                f"--run.out={folder}",
                f"--run.seed={self.seed}",
                f"--run.resume={'auto' if self.arguments.resume else 'no'}",
                f"--parallel.tensor_model_parallel_size={tp}",
                f"--parallel.pipeline_model_parallel_size={pp}",
                f"--tokenizer.path={self.data / 'tokenizer'}",
                *overrides,
            ],
        )
        run_stage(stage, config, self.runtime)
        return folder

    # What people do in the paper.

    def answers(self, policy: Path, prompts: list[Prompt], seed: int) -> list[Answer]:
        """One sampled answer to each prompt."""
        actor = self.role("actor", policy)
        return generate_answers(actor, prompts, self.tokenizer, TEMPLATE, ROLLOUT, 512, 1, seed)

    def role(self, name: str, folder: Path) -> Role:
        return make_role(
            name, ModelConfig(checkpoint=str(folder)), "fp32", self.seed, self.tokenizer, self.runtime, resume=None
        )

    def training_prompts(self, round: int, count: int, seed: int) -> list[Prompt]:
        """Half benign, half harmful, most of those as red-team attacks that rounds up to this one know."""
        shares = {"benign": 0.5, "red-team": 0.4, "plain": 0.1}
        drawn = [
            as_record(prompt)
            for kind, share in shares.items()
            for prompt in self.world.prompts("train", kind, round, max(1, int(count * share)), seed)
        ]
        random.Random(seed).shuffle(drawn)
        return drawn

    def annotate_round(self, round: int, policy: Path, sft: Path) -> tuple[str, str]:
        """Pairs of answers of the current policy (half of them against SFT's), labelled; training and held-out file."""
        count = max(80, int(PAIRS[round] * self.scale))
        held_out = count // 15
        self.say(f"round {round}: sampling and labelling {count} pairs")
        seed = 1000 * (self.seed + 1) + 10 * round
        prompts = self.training_prompts(round, count, seed)
        half = len(prompts) // 2
        first = self.answers(policy, prompts, seed + 1)
        second = self.answers(policy, prompts[:half], seed + 2) + self.answers(sft, prompts[half:], seed + 3)
        rows = annotate(
            self.world,
            [(p.prompt, a.response, b.response) for p, a, b in zip(prompts, first, second, strict=True)],
            seed + 4,
        )
        return (
            self.write(write_comparisons, f"round{round}/train.jsonl", rows[held_out:]),
            self.write(write_comparisons, f"round{round}/held_out.jsonl", rows[:held_out]),
        )

    # The stages.

    def fine_tune(self) -> Path:
        """SFT: first on clean demonstrations (which stand for pretraining), then on the mixture people wrote."""
        folder = None
        for name, full in SFT_STEPS.items():
            clean = name == "pretrain"
            rows = self.world.demonstrations(SFT_STEPS[name] * 48, self.seed, clean=clean)
            start_from = [f"--model.checkpoint={folder}"] if folder else []
            folder = self.stage(
                "sft",
                name,
                f"--data.train=[{self.write(write_demonstrations, f'{name}.jsonl', rows)}]",
                f"--training.steps={self.steps(full)}",
                f"--optimizer.schedule={'constant' if clean else 'linear'}",
                *start_from,
            )
        return folder

    def round(self, round: int, policy: Path, sft: Path, models: dict[str, Path], files: list[str]) -> Path:
        """One round of the paper's loop: red-team, label, reward and cost model on all rounds' labels, PPO-Lag."""
        train, held_out = self.annotate_round(round, policy, sft)
        files.append(train)
        for which in ("reward", "cost"):
            models[which] = self.stage(
                which,
                f"round{round}/{which}",
                f"--model.checkpoint={models.get(which, sft)}",
                f"--data.train=[{','.join(files)}]",
                f"--data.eval=[{held_out}]",
                f"--training.steps={self.steps(STEPS[which][round])}",
            )
        # A limit in the new cost model's own units: halfway from the sign's boundary to answers labelled safe.
        self.threshold = json.loads((models["cost"] / "eval.json").read_text())["safe_score"] / 2
        return self.ppo("ppo-lag", f"round{round}/ppo", policy, models, round)

    def ppo(self, algorithm: str, out: str, policy: Path, models: dict, round: int, *more: str) -> Path:
        prompts = [
            prompt
            for kind, count in (("benign", 4000), ("red-team", 3000), ("plain", 1000))
            for prompt in self.world.prompts("train", kind, round, count, self.seed)
        ]
        return self.stage(
            algorithm,
            out,
            f"--actor.checkpoint={policy}",
            f"--reward_model.checkpoint={models['reward']}",
            f"--cost_model.checkpoint={models['cost']}",
            f"--data.prompts=[{self.write(write_prompts, f'round{round}/prompts.jsonl', prompts)}]",
            f"--ppo.steps={self.steps(30)}",
            f"--lagrange.threshold={self.threshold}",
            *more,
        )

    # The verdict.

    def judged(self, policies: dict[str, Path], models: dict[str, Path]) -> tuple[list[dict], dict]:
        """Every policy on held-out prompts, judged by the world's truth; the summary's `models` and scores."""
        split, count = self.arguments.split, max(40, int(EVALUATION_PROMPTS * min(1.0, self.scale)))
        prompts = [
            as_record(prompt)
            for kind in ("red-team", "benign")
            for prompt in self.world.prompts(split, kind, 3, count, self.seed)
        ]
        scorers = {f"{which}_model": self.role(f"{which}_model", folder) for which, folder in models.items()}
        judgements, scores = {}, {}
        for name, folder in policies.items():
            self.say(f"judging {name} on {len(prompts)} {split} prompts")
            answers = self.answers(folder, prompts, 17)
            truth = [judge(self.world, a.prompt, a.response, ended=a.ended) for a in answers]
            judgements[name] = [Judgement(t.helpfulness, t.harmful, float(t.harmful), t.refusal) for t in truth]
            scored = score_answers(scorers, answers, self.tokenizer, TEMPLATE, 64, 512)
            scores[name] = {
                "reward": scored["reward_model"],
                "cost": scored["cost_model"],
                "harmful": [t.harmful for t in truth],
            }
            rows = [{**dataclasses.asdict(a), **dataclasses.asdict(t)} for a, t in zip(answers, truth, strict=True)]
            self.write(write_jsonl, f"answers/{name}.jsonl", rows)
        judged = compare_models(judgements, prompts)
        for model in judged:
            for key in ("reward", "cost"):
                found = scores[model["name"]][key]
                model[f"mean_{key}"] = sum(found) / len(found)
        return judged, scores

    def ablations(self, sft: Path, first_round: Path, models: dict[str, Path]) -> list[dict]:
        """What PPO on reward alone and fixed shaping make of SFT with round 1's models, beside PPO-Lag in round 1.

        Round 1's and not the last: the later reward models were taught with pairs from policies that were safe already,
        and have learnt some of the safety that is to be tested.
        """
        runs = [("PPO (reward only)", "ppo", None)]
        runs += [(f"shaping ν = {nu:g}", "shaping", nu) for nu in SHAPING_COEFFS]
        policies = {"SFT": sft, "PPO-Lag": first_round}
        for name, kind, nu in runs:
            if kind == "ppo":
                policies[name] = self.ppo("ppo", "ablations/ppo", sft, models, 1)
            else:
                coefficient = f"--ppo.shaping_coeff={nu}"
                policies[name] = self.ppo("ppo-reward-shaping", f"ablations/nu-{nu:g}", sft, models, 1, coefficient)
        judged, _ = self.judged(policies, models)
        by_name = {model["name"]: model for model in judged}
        runs.insert(0, ("PPO-Lag", "ppo-lag", None))
        return [{**by_name[name], "kind": kind, "nu": nu} for name, kind, nu in runs]


def as_record(prompt: WorldPrompt) -> Prompt:
    return Prompt(prompt.text, red_team=prompt.category is not None, category=prompt.category)


def run(arguments: argparse.Namespace, runtime: Runtime) -> None:
    quickstart = Quickstart(arguments, runtime)
    sft = quickstart.fine_tune()
    policies, models, files, facts = {"SFT": sft}, {}, [], {"reward": [], "cost": []}
    policy = sft
    for round in ROUNDS[: arguments.rounds]:
        policy = quickstart.round(round, policy, sft, models, files)
        policies[f"round {round}"] = policy
        if round == 1:
            first_models = dict(models)
        for which, folder in models.items():
            facts[which].append(json.loads((folder / "eval.json").read_text()))
    judged, scores = quickstart.judged(policies, models)
    last = json.loads((policy / "metrics.jsonl").read_text().splitlines()[-1])
    summary = {
        "seed": arguments.seed,
        "world_seed": arguments.world_seed,
        "split": arguments.split,
        "layout": arguments.layout,
        "seconds": int(time.monotonic() - quickstart.started),
        "models": judged,
        "reward_model_accuracy": [found["accuracy"] for found in facts["reward"]],
        "cost_model_accuracy": [found["accuracy"] for found in facts["cost"]],
        "cost_model_sign_accuracy": [found["sign_accuracy"] for found in facts["cost"]],
        "lambda_final": last["lambda"],
    }
    if arguments.ablations:
        summary["ablations"] = {"points": quickstart.ablations(sft, policies["round 1"], first_models)}
    if runtime.is_main:
        runs = [(name, folder / "metrics.jsonl") for name, folder in policies.items() if name != "SFT"]
        write_report(quickstart.out / "report", summary, runs, scores)
        print("\n" + format_table(summary))
        print(f"\n{summary['seconds']} s in all; pictures: {quickstart.out / 'report' / 'index.html'}")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="examples/quickstart/run.sh", description=__doc__.split("\n\n")[0])
    parser.add_argument("--layout", choices=LAYOUTS, default="tp2", help="tensor x pipeline x data parallel sizes")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data order and sampling")
    parser.add_argument("--out", default="runs/quickstart", help="folder for everything")
    parser.add_argument("--resume", action="store_true", help="go on in a folder that holds an unfinished run")
    parser.add_argument("--ablations", action="store_true", help="also run PPO on reward alone and fixed shaping")
    parser.add_argument("--rounds", type=int, choices=ROUNDS, default=3, help="rounds of PPO-Lag")
    parser.add_argument("--scale", type=float, default=1.0, help="share of all steps and pairs, to see it work sooner")
    parser.add_argument("--world-seed", type=int, default=2023, help="another world has other facts and other harm")
    parser.add_argument("--split", choices=("test", "dev"), default="test", help="prompts of the verdict")
    return parser.parse_args()


def launch(processes: int) -> None:
    """Become torchrun, which starts this program once per process of the layout."""
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *sys.argv]
    os.execv(sys.executable, [sys.executable, *command])


def main() -> int:
    arguments = read_arguments()
    tp, pp, dp = LAYOUTS[arguments.layout]
    try:
        if (Path(arguments.out) / "data").exists() and not arguments.resume:
            raise UserError(f"--out {arguments.out}: holds a run already; choose another folder, or add --resume")
        if tp * pp * dp != int(os.environ.get("WORLD_SIZE", "1")):
            launch(tp * pp * dp)
        with start(ParallelConfig(tp, pp), arguments.seed) as runtime:
            run(arguments, runtime)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"quickstart: error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
