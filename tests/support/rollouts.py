"""Small rollouts in one process.

Legend: B samples.
"""

import torch

from megatron_safe.config import ModelConfig, RolloutConfig
from megatron_safe.data.batches import TokenBatch, collate
from megatron_safe.rollout.decoder import Decoder
from megatron_safe.rollout.generate import generate

VOCABULARY = 21
NEVER = -1  # an end of sequence that no model draws
PAD = 3
MODEL = ModelConfig(
    num_layers=2, hidden_size=32, ffn_hidden_size=40, num_attention_heads=4, num_query_groups=2,
    max_sequence_length=64, vocab_multiple=8, init_std=0.3,
)  # fmt: skip
LENGTHS = [1, 4, 9, 2, 7, 1]
ROLLOUT = RolloutConfig(max_new_tokens=8)
GREEDY = RolloutConfig(max_new_tokens=8, temperature=0.0)
MANY = [3, 1, 9, 9, 2, 1, 6, 4, 12, 1, 5, 7, 2]


def make_prompts(lengths=LENGTHS, seed=4) -> TokenBatch:
    generator = torch.Generator().manual_seed(seed)
    return collate([(torch.randint(VOCABULARY, (n,), generator=generator).tolist(), n) for n in lengths], PAD)


def run(actor, prompts, rollout=ROLLOUT, eos=NEVER, seed=0, ids=None, limits=None, pad=PAD):
    ids = torch.arange(len(prompts)) if ids is None else torch.tensor(ids)
    limits = None if limits is None else torch.tensor(limits)
    return generate(actor, prompts, ids, rollout, seed, eos, pad, limits)


def answers(trajectories) -> list[list[int]]:
    """The sampled tokens of each row, read off the batch by the lengths alone."""
    batch = trajectories.batch
    return [
        row[first:last]
        for row, first, last in zip(
            batch.tokens_BL.tolist(), batch.prompt_lengths_B.tolist(), batch.lengths_B.tolist(), strict=True
        )
    ]


def watch(monkeypatch) -> list:
    """The ticks that are computed from now on."""
    ticks, forward = [], Decoder.forward
    monkeypatch.setattr(Decoder, "forward", lambda *args: ticks.append(args[2]) or forward(*args))
    return ticks
