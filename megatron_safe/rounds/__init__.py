"""The paper's loop as one job that can be stopped anywhere: SFT, then rounds of red-teaming, labels, reward and cost
model and PPO-Lag, and a report at the end (paper, section 4.1)."""

from megatron_safe.rounds.loop import Loop, run

__all__ = ["Loop", "run"]
