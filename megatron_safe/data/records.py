"""The rows that the stages learn from, after reading and checking and before tokenising.

A dialogue is one exchange or more: `history` holds what was said before `prompt`, which is the user's last turn.
"""

from dataclasses import dataclass

History = tuple[tuple[str, str], ...]
"""(user, assistant) exchanges before a prompt, oldest first; empty for a single-turn prompt."""


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A prompt with a response to imitate: SFT, and the PTX term of PPO-Lag."""

    prompt: str
    response: str
    history: History = ()


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two responses to one prompt, judged on two separate dimensions (paper, section 3.1).

    better_response_id: 0 or 1, the more helpful one whatever its harm.
    safer_response_id: 0 or 1, the less harmful one whatever its help.
    is_response_0_safe, is_response_1_safe: whether each is harmless by itself.
    response_0_categories, response_1_categories: names of the harms in each; empty where there are none, or unknown.

    A label is None where its source did not ask that question. The two ids are different human judgements and often
    disagree; nothing may derive one from the other.
    """

    prompt: str
    response_0: str
    response_1: str
    better_response_id: int | None
    safer_response_id: int | None
    is_response_0_safe: bool | None
    is_response_1_safe: bool | None
    response_0_categories: tuple[str, ...] = ()
    response_1_categories: tuple[str, ...] = ()
    history: History = ()

    @property
    def responses(self) -> tuple[str, str]:
        return self.response_0, self.response_1

    @property
    def is_safe(self) -> tuple[bool | None, bool | None]:
        return self.is_response_0_safe, self.is_response_1_safe


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt for the policy to answer.

    red_team: written to provoke harm; λ may be set to count these alone.
    category: harm category, for reports; None where there is none.
    origin: where it came from (an attack and its seed, say); None where nobody said.
    """

    prompt: str
    red_team: bool = False
    category: str | None = None
    history: History = ()
    origin: str | None = None
