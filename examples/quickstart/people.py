"""People who label pairs of answers, played by the tiny world."""

from collections.abc import Sequence

from annotators import annotate
from world import World


def label(pairs: Sequence[dict], seed: int, world_seed: int) -> list[dict]:
    """Noisy labels (annotators.py), for `annotator.program` of `megatron-safe rounds`."""
    rows = [(pair["prompt"], pair["response_0"], pair["response_1"]) for pair in pairs]
    return annotate(World(world_seed), rows, seed)
