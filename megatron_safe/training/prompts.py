"""Which prompts each rollout batch answers."""

from megatron_safe.data.datasets import PromptDataset
from megatron_safe.data.mixture import Mixture
from megatron_safe.data.sampler import ShuffledStream
from megatron_safe.errors import UserError


class PromptStream:
    """Indices of each rollout batch, a pure function of seed and step.

    With a `red_team_share` the prompts marked red_team are a stream of their own, and each batch takes that share of
    it, evenly spread so that every mini-batch has its part. Within each, the entries of a `mixture` with weights have
    their parts, where they have such prompts.
    """

    def __init__(
        self,
        prompts: PromptDataset,
        batch_size: int,
        red_team_share: float | None,
        seed: int,
        mixture: Mixture | None = None,
    ):
        """mixture: what the prompts were read from; None for prompts that are all alike.

        Raises UserError when the share is no share, or asks for a kind of prompt that is missing.
        """
        everything = range(len(prompts))
        if red_team_share is None:
            self._pools = [list(everything)]
            sizes = [batch_size]
        else:
            if not 0 <= red_team_share <= 1:
                raise UserError(f"ppo.red_team_share: expected a number from 0 to 1, found {red_team_share}")
            red = [index for index in everything if prompts.records[index].red_team]
            other = [index for index in everything if not prompts.records[index].red_team]
            reds = round(red_team_share * batch_size)
            for name, pool, size in (("red_team true", red, reds), ("red_team false", other, batch_size - reds)):
                if size and not pool:
                    raise UserError(
                        f"data.prompts: expected some with {name} for ppo.red_team_share {red_team_share}, found none"
                    )
            parts = [(pool, size) for pool, size in ((red, reds), (other, batch_size - reds)) if size]
            self._pools = [pool for pool, _ in parts]
            sizes = [size for _, size in parts]
        self._streams = [
            ShuffledStream(len(pool), size, seed)
            if mixture is None
            else mixture.stream(
                [prompts.records[i] for i in pool], size, seed, may_lack=red_team_share is not None
            )
            for pool, size in zip(self._pools, sizes, strict=True)
        ]

    def indices(self, step: int) -> list[int]:
        """[rollout_batch_size] indices into the prompts."""
        placed = []
        for order, (pool, stream) in enumerate(zip(self._pools, self._streams, strict=True)):
            chosen = [pool[index] for index in stream.indices(step)]
            placed += [((i + 0.5) / len(chosen), order, index) for i, index in enumerate(chosen)]
        return [index for _, _, index in sorted(placed)]
