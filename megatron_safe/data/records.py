"""The rows that the stages learn from, after reading and checking and before tokenising."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A prompt with a response to imitate: SFT, and the PTX term of PPO-Lag."""

    prompt: str
    response: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two responses to one prompt, judged on two separate dimensions (paper, section 3.1).

    better_response_id: 0 or 1, the more helpful one whatever its harm.
    safer_response_id: 0 or 1, the less harmful one whatever its help.
    is_response_0_safe, is_response_1_safe: whether each is harmless by itself.

    The two ids are different human judgements and often disagree; nothing may derive one from the other.
    """

    prompt: str
    response_0: str
    response_1: str
    better_response_id: int
    safer_response_id: int
    is_response_0_safe: bool
    is_response_1_safe: bool

    @property
    def responses(self) -> tuple[str, str]:
        return self.response_0, self.response_1

    @property
    def is_safe(self) -> tuple[bool, bool]:
        return self.is_response_0_safe, self.is_response_1_safe


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt for the policy to answer.

    red_team: written to provoke harm; λ may be set to count these alone.
    category: harm category, for reports; None where there is none.
    """

    prompt: str
    red_team: bool = False
    category: str | None = None
