"""The Lagrange multiplier λ of Safe RLHF: how much the cost weighs against the reward (Safe RLHF, appendix B).

Legend: B episodes of a rollout batch, over all data-parallel ranks.
"""

import math
from typing import Any

import torch

from megatron_safe.kernels.lagrangian import lagrange_state, lagrange_step


class LagrangeMultiplier:
    """Owns λ and the last `window` episode costs, on a device that it never waits for; J_C is the mean of the costs.

    ln λ ← ln λ + α λ (J_C - threshold): λ grows while the policy is more harmful than the threshold allows.

    Why the step is proportional to λ: it is gradient ascent of λ (J_C - threshold) with respect to ln λ, and
    dλ / d ln λ = λ. Written in ln λ, λ stays positive without a projection. The price is that a small λ moves slowly:
    1/λ falls by about α (J_C - threshold) per update, so a λ that has decayed to λ_0 needs about
    1 / (λ_0 α (J_C - threshold)) updates to come back, however harmful the policy has become. `lambda_min` bounds that
    wait; the authors' code has no floor (use a tiny lambda_min for its behaviour), and 0 does not exist in log space.

    lambda_init: λ before the first update. lambda_max: ceiling of λ. lambda_lr: α. threshold: the J_C that is aimed at,
    in units of the cost model's score, may be negative (the paper's -d). update_delay_steps: λ does not move
    before this step, so that J_C and the cost critic settle first. window: number of episodes J_C is taken over.
    lambda_min: floor of λ, > 0; at 0.01 the cost still weighs 1 % of the reward. device: that of the training; all
    ranks hold the same.

    Raises ValueError, naming the field, unless 0 < lambda_min <= lambda_init <= lambda_max, lambda_lr >= 0,
    update_delay_steps >= 0, window >= 1, and all are finite.
    """

    def __init__(
        self,
        lambda_init: float,
        lambda_max: float,
        lambda_lr: float,
        threshold: float,
        update_delay_steps: int,
        window: int,
        lambda_min: float = 0.01,
        device: torch.device | str = "cpu",
    ) -> None:
        floats = {
            "lambda_init": lambda_init,
            "lambda_max": lambda_max,
            "lambda_lr": lambda_lr,
            "threshold": threshold,
            "lambda_min": lambda_min,
        }
        for name, number in floats.items():
            if not math.isfinite(number):
                raise ValueError(f"{name} must be finite, found {number}")
        if lambda_min <= 0:
            raise ValueError(f"lambda_min must be > 0 (ln λ has no zero), found {lambda_min}")
        if lambda_init < lambda_min:
            raise ValueError(f"lambda_init must be >= lambda_min = {lambda_min}, found {lambda_init}")
        if lambda_max < lambda_init:
            raise ValueError(f"lambda_max must be >= lambda_init = {lambda_init}, found {lambda_max}")
        if lambda_lr < 0:
            raise ValueError(f"lambda_lr must be >= 0, found {lambda_lr}")
        if update_delay_steps < 0:
            raise ValueError(f"update_delay_steps must be >= 0, found {update_delay_steps}")
        if window < 1:
            raise ValueError(f"window must be >= 1, found {window}")
        self.update_delay_steps = update_delay_steps
        self._rule = dict(lambda_lr=lambda_lr, threshold=threshold, lambda_min=lambda_min, lambda_max=lambda_max)
        self._state = lagrange_state(lambda_init, window, device)

    @property
    def value(self) -> torch.Tensor:
        """λ, within [lambda_min, lambda_max]; 0-d fp64 on the device, and later steps do not change it."""
        return self._state.lambda_1[0].clone()

    @property
    def mean_episode_cost(self) -> torch.Tensor:
        """J_C, NaN before the first episode; 0-d fp64 on the device."""
        _, costs_W, episodes_1 = self._state
        # Of the state alone, so that it is the same after a resume; where it is not filled, the ring holds 0.
        return costs_W.sum() / episodes_1[0].clamp(max=len(costs_W))

    def step(
        self,
        step: int,
        episode_costs_B: torch.Tensor,
        counted_B: torch.Tensor | None = None,
        move: bool = True,
    ) -> None:
        """Observe one rollout batch's episode costs; then, if `move` and step >= update_delay_steps, one step of ln λ.

        episode_costs_B: [B] floating, on the device: of the whole global batch in its order, the same on every rank.
        counted_B: [B] bool, the episodes that count (None: all); a cost that is not finite never does, as it would
        poison λ for good. If more count than the window holds, only the last of them are kept. Before the first counted
        episode λ stays.
        """
        lagrange_step(
            self._state, episode_costs_B, counted_B, move and step >= self.update_delay_steps, **self._rule
        )

    def state_dict(self) -> dict[str, Any]:
        """λ, the costs in the window, oldest first, and how many there have ever been; survives JSON bit for bit.

        Waits for the device. The settings are the config's, not the checkpoint's.
        """
        lambda_1, costs_W, episodes_1 = self._state
        episodes, costs = int(episodes_1), costs_W.tolist()
        oldest_first = [costs[i % len(costs)] for i in range(max(0, episodes - len(costs)), episodes)]
        return {"lambda": float(lambda_1), "episode_costs": oldest_first, "episodes": episodes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`; under changed settings the newest costs and λ clamped to the new bounds are kept.

        "episodes" may be missing: then J_C, a sum over the ring, may differ in its last bits from the run that saved.
        Raises KeyError for another missing key, ValueError for a number that is not finite.
        """
        value, episode_costs = float(state["lambda"]), state["episode_costs"]
        if not math.isfinite(value):
            raise ValueError(f"lambda must be finite, found {value}")
        for index, cost in enumerate(episode_costs):
            if not math.isfinite(cost):
                raise ValueError(f"episode_costs[{index}] must be finite, found {cost}")
        lambda_1, costs_W, episodes_1 = self._state
        window = len(costs_W)
        newest = episode_costs[-window:]
        # A ring that is not full begins at place 0; a full one where it did, so that its sum has the same bits.
        episodes = state.get("episodes", len(newest)) if len(newest) == window else len(newest)
        ring = [0.0] * window
        for i, cost in enumerate(newest, start=episodes - len(newest)):
            ring[i % window] = cost
        lambda_1.fill_(min(max(value, self._rule["lambda_min"]), self._rule["lambda_max"]))
        costs_W.copy_(torch.tensor(ring, dtype=torch.float64))
        episodes_1.fill_(episodes)
