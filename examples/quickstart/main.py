"""The quickstart: a tiny Llama through SFT, reward and cost model and three rounds of PPO-Lag, as in the paper.

Start it with run.sh. It writes the tiny world's files (world.py) and then runs `megatron-safe rounds` with rounds.yaml,
where the world stands for people: it labels (people.py), and at the end it judges (world_judge.py), by rules that no
model here was trained on directly.
"""

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path

import yaml
from ablations import ablate
from world import World, write_demonstrations, write_prompts, write_tokenizer

from megatron_safe.cli import parse, run_stage
from megatron_safe.config import ParallelConfig
from megatron_safe.errors import UserError
from megatron_safe.rounds import Loop
from megatron_safe.runtime import Runtime, start

SETTINGS = Path(__file__).with_name("rounds.yaml")
LAYOUTS = {"single": (1, 1, 1), "tp2": (2, 1, 1), "pp2": (1, 2, 1), "dp2": (1, 1, 2), "tp2pp2": (2, 2, 1)}
PAIRS = (5900, 8800, 8500)
ROUNDS = range(1, len(PAIRS) + 1)
EVALUATION_PROMPTS = 1000


def settings(arguments: argparse.Namespace) -> dict:
    """rounds.yaml with the paths, seeds, layout and scale of this run."""
    tp, pp, _ = LAYOUTS[arguments.layout]
    data = Path(arguments.out) / "data"
    job = yaml.safe_load(SETTINGS.read_text(encoding="utf-8").replace("{data}", str(data)))
    job["run"] = {"out": arguments.out, "seed": arguments.seed}
    job["parallel"] = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    job["rounds"] = job["rounds"][: arguments.rounds]
    trained = [*job["sft"].values(), *(round[which] for round in job["rounds"] for which in ("reward", "cost"))]
    for stage in trained:
        stage["training"]["steps"] = scaled(stage["training"]["steps"], arguments, least=2)
    job["ppo"]["ppo"] = {"steps": scaled(30, arguments, least=2)}
    for program in (job["annotator"]["program"], job["evaluate"]["judge"]["program"]):
        program["arguments"] = {"world_seed": arguments.world_seed}
    return job


def scaled(full: int, arguments: argparse.Namespace, least: int) -> int:
    return max(least, int(full * arguments.scale))


def write_world(arguments: argparse.Namespace) -> None:
    """The tokenizer, the demonstrations and the prompts of all rounds, as files."""
    world, data, seed = World(arguments.world_seed), Path(arguments.out) / "data", arguments.seed
    write_tokenizer(world, data / "tokenizer")
    for name, rows in (("pretrain", 210 * 48), ("sft", 310 * 48)):
        demonstrations = world.demonstrations(rows, seed, clean=name == "pretrain")
        write_demonstrations(data / f"{name}.jsonl", demonstrations)
    for number, pairs in enumerate(PAIRS[: arguments.rounds], start=1):
        # Half benign, half harmful, most of those as red-team attacks that rounds up to this one know.
        asked = [
            prompt
            for kind, share in (("benign", 0.5), ("red-team", 0.4), ("plain", 0.1))
            for prompt in world.prompts(
                "train", kind, number, int(scaled(pairs, arguments, least=80) * share),
                1000 * (seed + 1) + 10 * number,
            )
        ]  # fmt: skip
        random.Random(1000 * (seed + 1) + 10 * number).shuffle(asked)
        write_prompts(data / f"round{number}" / "asked.jsonl", asked)
        write_prompts(
            data / f"round{number}" / "prompts.jsonl",
            [
                prompt
                for kind, count in (("benign", 4000), ("red-team", 3000), ("plain", 1000))
                for prompt in world.prompts("train", kind, number, count, seed)
            ],
        )
    count = max(40, int(EVALUATION_PROMPTS * min(1.0, arguments.scale)))
    write_prompts(
        data / "held_out_prompts.jsonl",
        [
            prompt
            for kind in ("red-team", "benign")
            for prompt in world.prompts(arguments.split, kind, len(PAIRS), count, seed)
        ],
    )


def run(arguments: argparse.Namespace, runtime: Runtime) -> None:
    runtime.on_main(lambda: write_world(arguments))
    job = settings(arguments)
    config = parse("rounds", ["--config=" + json.dumps(job)])
    loop = Loop(config, runtime, parse, run_stage)
    loop.train()
    facts = {}
    if arguments.ablations:
        begin = time.monotonic()
        facts = {"ablations": ablate(loop)}
        loop.progress.started += time.monotonic() - begin  # which are no part of the job that the report times
    loop.evaluate(facts)
    runtime.print(f"pictures: {Path(arguments.out) / 'evaluate' / 'report' / 'index.html'}")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="examples/quickstart/run.sh", description=__doc__.split("\n\n")[0])
    parser.add_argument("--layout", choices=LAYOUTS, default="tp2", help="tensor x pipeline x data parallel sizes")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data order and sampling")
    parser.add_argument("--out", default="runs/quickstart", help="folder for everything")
    parser.add_argument("--resume", action="store_true", help="go on in a folder that holds an unfinished run")
    parser.add_argument("--ablations", action="store_true", help="also run PPO on reward alone and fixed shaping")
    parser.add_argument("--rounds", type=int, choices=ROUNDS, default=len(ROUNDS), help="rounds of PPO-Lag")
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
