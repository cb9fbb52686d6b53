"""How a run is split over ranks, and the other layouts that would do."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_safe.config import ModelConfig
from megatron_safe.errors import UserError
from megatron_safe.models.llama import check_model_fits

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups, and what goes with them.

    tp, pp, dp, cp: tensor, pipeline, data and context parallel ranks. virtual: model chunks on each pipeline stage
    (interleaved schedule; 1: none). sequence_parallel: what TP does not split otherwise (norms, residuals) is split
    over its ranks by tokens. recompute: what a backward pass computes again instead of keeping: nothing, the core
    attention, or whole layers.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    virtual: int = 1
    sequence_parallel: bool = False
    recompute: Recompute = "none"

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.dp * self.cp

    @property
    def shards(self) -> int:
        """Ranks that hold the same weights: gradients are reduced over them, and a distributed optimizer's state is
        divided (Megatron's data-parallel group with context parallelism)."""
        return self.dp * self.cp

    def in_flight(self, stage: int, packs: int) -> float:
        """Packs whose activations a stage holds at most, in units of a whole stage's layers.

        1F1B: min(p - stage, m) (Narayanan et al. 2021, section 2.2.1). Interleaved with v chunks a stage: Megatron-Core
        warms up with 2 (p - stage - 1) + (v - 1) p chunks and then holds one more, each a v-th of the stage.
        """
        if self.virtual == 1:
            return min(self.pp - stage, packs)
        chunks = 2 * (self.pp - stage - 1) + (self.virtual - 1) * self.pp + 1
        return min(chunks, packs * self.virtual) / self.virtual

    def packs(self, tokens: float, max_tokens: int) -> int:
        """Micro-batches of a rank's `tokens`: filled to `max_tokens`, and two a stage to fill a pipeline."""
        least = 1 if self.pp == 1 else 2 * self.pp
        return max(least, math.ceil(tokens / max_tokens))

    def __str__(self) -> str:
        parts = [f"TP {self.tp} x PP {self.pp} x DP {self.dp}"]
        parts += [f"CP {self.cp}"] if self.cp > 1 else []
        parts += [f"{self.virtual} chunks a stage"] if self.virtual > 1 else []
        parts += ["sequence parallel"] if self.sequence_parallel else []
        parts += [f"recompute {self.recompute}"] if self.recompute != "none" else []
        return ", ".join(parts)


def possible(models: Iterable[ModelConfig], layout: Layout, rows: int) -> bool:
    """Whether these models, and `rows` of each optimizer step, can be split so."""
    try:
        for model in models:
            check_model_fits(model, layout.tp, layout.pp * layout.virtual, "")
    except UserError:
        return False
    return rows % layout.dp == 0


def nearest(
    like: Layout, models: list[ModelConfig], rows: int, devices_per_node: int, fits: Callable[[Layout], bool]
) -> Layout | None:
    """The possible layout of the same world that fits and takes the fewest doublings or halvings of TP and PP from
    `like`; of several the one with the smallest TP x PP. TP stays inside a node. None: there is none."""

    def distance(layout: Layout) -> tuple[float, int]:
        return abs(math.log2(layout.tp / like.tp)) + abs(math.log2(layout.pp / like.pp)), layout.tp * layout.pp

    for layout in sorted(_others(like, devices_per_node), key=distance):
        if possible(models, layout, rows) and fits(layout):
            return layout
    return None


def _others(like: Layout, devices_per_node: int) -> Iterator[Layout]:
    ranks = like.world // like.cp
    for tp in range(1, min(ranks, devices_per_node) + 1):
        for pp in range(1, ranks // tp + 1):
            if ranks % (tp * pp) == 0:
                yield dataclasses.replace(
                    like, tp=tp, pp=pp, dp=ranks // (tp * pp), virtual=like.virtual if pp > 1 else 1,
                    sequence_parallel=like.sequence_parallel and tp > 1,
                )  # fmt: skip
