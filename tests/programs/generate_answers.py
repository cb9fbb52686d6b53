"""Started by torchrun: answers in one layout, with few and with many slots and ticks a round.

usage: generate_answers.py TP PP OUT.json

Rank 0 writes [[tokens, lengths, log-probs] for each case of CASES] of its replica.
"""

import json
import sys
from pathlib import Path

import torch

from megatron_safe.config import ModelConfig, ParallelConfig, RolloutConfig
from megatron_safe.data.batches import collate
from megatron_safe.models.roles import Role
from megatron_safe.rollout.generate import TICKS_A_ROUND, generate
from megatron_safe.runtime import start

LENGTHS = [3, 1, 9, 9, 2, 1, 6, 4, 12, 1, 5, 7, 2]
REPEATED = [0, 0, 1, 2, 3, 4, 5, 5, 5, 6, 6, 6, 6, 7, 8, 9, 10, 11, 12, 12]
CASES = [
    (model, slots, ticks)
    for model in (
        {},
        {"tie_embeddings": True, "qkv_bias": True, "num_query_groups": 2},
        {"qk_norm": True, "sliding_window": 4},
    )
    for slots, ticks in ((1, 1), (3, 1), (7, 4), (0, 3))
]


def main(tp: int, pp: int, out: Path) -> None:
    found = []
    with start(ParallelConfig(tp, pp, timeout_seconds=60.0), 0) as runtime:
        draw = torch.Generator().manual_seed(4)
        rows = [torch.randint(37, (n,), generator=draw).tolist() for n in LENGTHS]
        prompts = collate([(rows[i], len(rows[i])) for i in REPEATED], 3)
        actors = {}
        for changes, slots, ticks in CASES:
            TICKS_A_ROUND["cpu"] = ticks
            model = ModelConfig(
                num_layers=4, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, max_sequence_length=64,
                vocab_multiple=8, init_std=0.3, **changes,
            )  # fmt: skip
            key = str(changes)
            actors[key] = actors.get(key) or Role("actor", model, runtime, 37, "fp32", seed=2)
            rollout = RolloutConfig(max_new_tokens=9, temperature=1.0, slots=slots)
            result = generate(actors[key], prompts, torch.arange(len(prompts)), rollout, 0, 5, 3)
            found.append([result.batch.tokens_BL.tolist(), result.batch.lengths_B.tolist(),
                          result.log_probs_BT.tolist()])  # fmt: skip
        if runtime.is_main:
            out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
