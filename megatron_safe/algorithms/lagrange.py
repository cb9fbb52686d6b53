"""The Lagrange multiplier λ of Safe RLHF: how much the cost weighs against the reward (Safe RLHF, appendix B)."""

import math
from collections import deque
from typing import Any


class LagrangeMultiplier:
    """Owns λ and the last `window` episode costs; J_C is their mean.

    ln λ ← ln λ + α λ (J_C - threshold): λ grows while the policy is more harmful than the threshold allows.

    Why the step is proportional to λ: it is gradient ascent of λ (J_C - threshold) with respect to ln λ, and
    dλ / d ln λ = λ. Written in ln λ, λ stays positive without a projection. The price is that a small λ moves slowly:
    1/λ falls by about α (J_C - threshold) per update, so a λ that has decayed to λ_0 needs about
    1 / (λ_0 α (J_C - threshold)) updates to come back, however harmful the policy has become. `lambda_min` bounds that
    wait; the authors' code has no floor (use a tiny lambda_min for its behaviour), and 0 does not exist in log space.

    lambda_init: λ before the first update. lambda_max: ceiling of λ. lambda_lr: α. threshold: the J_C that is aimed at,
    in units of the cost model's score, may be negative (the paper's -d). update_delay_steps: `update` does nothing
    before this step, so that J_C and the cost critic settle first. window: number of episodes J_C is taken over.
    lambda_min: floor of λ, > 0; at 0.01 the cost still weighs 1 % of the reward.

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
        self.lambda_min = lambda_min
        self.lambda_max = lambda_max
        self.lambda_lr = lambda_lr
        self.threshold = threshold
        self.update_delay_steps = update_delay_steps
        self._lambda = float(lambda_init)
        self._episode_costs: deque[float] = deque(maxlen=window)

    @property
    def value(self) -> float:
        """λ, within [lambda_min, lambda_max]."""
        return self._lambda

    @property
    def mean_episode_cost(self) -> float | None:
        """J_C, or None before the first episode."""
        if not self._episode_costs:
            return None
        # fsum does not depend on the order of the episodes, hence neither on how many ranks they came from.
        return math.fsum(self._episode_costs) / len(self._episode_costs)

    def observe(self, episode_costs: list[float]) -> None:
        """Append one rollout batch's episode costs, oldest first: those of ALL data-parallel ranks, already gathered.

        Every rank must pass the same list in the same order, or their λ part ways. If the batch is larger than the
        window, only its end is kept. Raises ValueError at a cost that is not finite: it would poison λ for good.
        """
        _check_finite_costs(episode_costs)
        self._episode_costs.extend(float(cost) for cost in episode_costs)

    def update(self, step: int) -> None:
        """One step of ln λ; nothing while step < update_delay_steps or no episode has been observed."""
        mean_episode_cost = self.mean_episode_cost
        if step < self.update_delay_steps or mean_episode_cost is None:
            return
        log_step = self.lambda_lr * self._lambda * (mean_episode_cost - self.threshold)
        # The step of ln λ, taken on λ: exp(log(λ)) may miss λ by a rounding error, and with it the exact bounds.
        # math.exp raises above 709; long before that the ceiling holds.
        self._lambda = self._clamp(self._lambda * math.exp(min(log_step, 700.0)))

    def state_dict(self) -> dict[str, Any]:
        """λ and the window; survives JSON bit for bit. The settings are the config's, not the checkpoint's."""
        return {"lambda": self._lambda, "episode_costs": list(self._episode_costs)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`; under changed settings the newest costs and λ clamped to the new bounds are kept.

        Raises KeyError for a missing key, ValueError for a number that is not finite.
        """
        value, episode_costs = float(state["lambda"]), state["episode_costs"]
        if not math.isfinite(value):
            raise ValueError(f"lambda must be finite, found {value}")
        _check_finite_costs(episode_costs)
        self._lambda = self._clamp(value)
        self._episode_costs.clear()
        self._episode_costs.extend(episode_costs)

    def _clamp(self, value: float) -> float:
        return min(max(value, self.lambda_min), self.lambda_max)


def _check_finite_costs(episode_costs: list[float]) -> None:
    for index, cost in enumerate(episode_costs):
        if not math.isfinite(cost):
            raise ValueError(f"episode_costs[{index}] must be finite, found {cost}")
