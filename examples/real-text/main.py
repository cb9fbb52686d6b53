"""Real text: a cost model from scratch on 1,800 pairs of PKU-SafeRLHF, beside a bag of words on the same split.

    python examples/real-text/main.py --pairs pku-saferlhf-pairs-2000.json --out runs/real-text

The vocabulary is learnt from the training part; the `cost` stage trains a small Llama with fresh weights; the `score`
stage reads the held-out answers. Settings were chosen with --validate, which holds out a part of the training part and
never reads the real held-out one.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

import baseline
import numpy as np
import verdict
import yaml
from pairs import Pair, comparison, read_pairs, repeated_responses, split, thinned, write_jsonl, write_tokenizer

from megatron_safe.cli import parse, run_stage
from megatron_safe.config import ParallelConfig
from megatron_safe.errors import UserError
from megatron_safe.runtime import Runtime, start

HERE = Path(__file__).parent
SHARE = 0.1
# Of the example; what the stages are set to is in cost.yaml.
VOCABULARY, EPOCHS, LEFT_OUT = 2048, 3, 0.3


def train_and_score(
    train: list[Pair], others: list[Pair], out: Path, seed: int, scale: float, runtime: Runtime
) -> np.ndarray:
    """Train a cost model on some pairs; [P, 2] costs of the others' safe and unsafe answers."""
    write_tokenizer(out / "tokenizer", train, VOCABULARY)
    draw = random.Random(seed)
    # The pairs as they are, and once for each further epoch with other words left out; the stage shuffles all of them.
    epochs = [train, *(thinned(train, LEFT_OUT, draw) for _ in range(EPOCHS - 1))]
    rows = [comparison(pair) for pairs in epochs for pair in pairs]
    data = write_jsonl(out / "train.jsonl", rows)
    answers = write_jsonl(
        out / "answers.jsonl",
        ({"prompt": p.prompt, "response": text} for p in others for text in (p.safe_response, p.unsafe_response)),
    )
    settings = HERE / "cost.yaml"
    batch = yaml.safe_load(settings.read_text(encoding="utf-8"))["batch"]
    shared = [f"--run.seed={seed}", f"--tokenizer.path={out / 'tokenizer'}"]
    cost = [
        f"--config={settings}", *shared, f"--run.out={out / 'cost'}", f"--data.train=[{data}]",
        f"--training.steps={max(2, int(scale * len(rows) / batch['global_batch_size']))}",
    ]  # fmt: skip
    config = parse("cost", cost)
    run_stage("cost", config, runtime)
    score = [
        *shared, f"--tokenizer.template={config.tokenizer.template}", f"--run.out={out / 'score'}",
        f"--cost_model.checkpoint={out / 'cost'}", f"--data.answers=[{answers}]",
        f"--data.max_length={config.batch.max_length}", "--run.tensorboard=false",
    ]  # fmt: skip
    run_stage("score", parse("score", score), runtime)
    with (out / "score" / "scores.jsonl").open(encoding="utf-8", newline="\n") as file:
        found = [json.loads(line)["cost"] for line in file]
    # Where the model has no score (a prompt too long for it) it is wrong.
    return np.array([np.nan if cost is None else cost for cost in found]).reshape(-1, 2)


def parameters(folder: Path) -> int:
    """Of the checkpoint's model, with the unused rows of its vocabulary."""
    model = yaml.safe_load((folder / "config.yaml").read_text())["model"]
    h, ffn, layers = model["hidden_size"], model["ffn_hidden_size"], model["num_layers"]
    vocab = -(-VOCABULARY // model["vocab_multiple"]) * model["vocab_multiple"]
    return vocab * h + layers * (4 * h * h + 3 * h * ffn + 2 * h) + h + h + 1


def run(arguments: argparse.Namespace, runtime: Runtime) -> dict:
    pairs = read_pairs(arguments.pairs)
    train, held_out = split(pairs, SHARE)
    if arguments.validate is not None:
        # Other seeds than the split's own hold out other prompts of the training part.
        train, held_out = split(train, 1 / 3, seed=1 + arguments.validate)
    groups = [pair.group for pair in held_out]
    runtime.print(f"{len(train)} pairs to train on, {len(held_out)} held out, no prompt in both")

    started = time.process_time()
    features, c, validated = baseline.choose(train)
    of_words = baseline.fit_and_score(train, held_out, features, c)
    runtime.print(f"baseline: {features}, C = {c:g}, {time.process_time() - started:.0f} s of CPU")

    ours, seconds = [], []
    for seed in arguments.seeds:
        wall, cpu = time.perf_counter(), time.process_time()
        ours.append(train_and_score(train, held_out, arguments.out / f"seed{seed}", seed, arguments.scale, runtime))
        seconds.append({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu})
    return {
        "command": "python examples/real-text/main.py " + " ".join(arguments.shown),
        "held_out": "validation" if arguments.validate is not None else "test",
        "pairs": {"train": len(train), "held_out": len(held_out)},
        "prompts": {"train": len({pair.group for pair in train}), "held_out": len(set(groups))},
        "held_out_responses_seen_in_training": repeated_responses(train, held_out),
        "parameters": parameters(arguments.out / f"seed{arguments.seeds[0]}" / "cost"),
        "seeds": arguments.seeds,
        "seconds": seconds,
        "baseline": {"features": features, "C": c, "cross_validation": validated},
        **verdict.compare(ours, of_words, groups),
    }


def table(summary: dict) -> str:
    def cell(found: dict) -> str:
        return f"{found['mean']:6.1%} ({found['interval'][0]:.1%} to {found['interval'][1]:.1%})"

    lines = [f"{'':18}{'cost model':28}{'bag of words':28}difference"]
    for metric in verdict.METRICS:
        cells = [f"{cell(summary[metric][name]):28}" for name in ("ours", "baseline", "difference")]
        seeds = ", ".join(f"{value:.1%}" for value in summary[metric]["seeds"])
        lines.append(f"{metric + ' accuracy':18}{''.join(cells)}\n{'':18}seeds: {seeds}")
    return "\n".join(lines)


def read_arguments(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="examples/real-text/main.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--pairs", type=Path, required=True, help="JSON array of {prompt, safe_response, ...}")
    parser.add_argument("--out", type=Path, default=Path("runs/real-text"), help="folder for everything")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of weights, left-out words and order")
    parser.add_argument("--validate", type=int, metavar="N", help="hold out a third of the training part, the N-th way")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the training steps, to see it work sooner")
    arguments = parser.parse_args(given)
    # What is published does not say where somebody keeps the file.
    arguments.shown = [Path(word).name if word == str(arguments.pairs) else word for word in given]
    return arguments


def main(given: list[str] | None = None) -> int:
    arguments = read_arguments(sys.argv[1:] if given is None else given)
    try:
        if arguments.out.exists() and any(arguments.out.iterdir()):
            raise UserError(f"--out {arguments.out}: expected a new folder, found one that holds something")
        with start(ParallelConfig(), 0) as runtime:
            summary = run(arguments, runtime)
    except UserError as error:
        print(f"real-text: error: {error}", file=sys.stderr, flush=True)
        return 2
    (arguments.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    verdict.draw(arguments.out / "accuracy.png", summary)
    print("\n" + table(summary))
    print(f"\n{arguments.out / 'summary.json'}, {arguments.out / 'accuracy.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
