"""Attacks on a policy: what is written around a seed prompt, and which of the successful ones are worth keeping.

Pure functions on text; `red_team.py` asks the policy and the cost model.
"""

import json
import math
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_safe.data.records import History, Prompt
from megatron_safe.errors import UserError

FAMILIES = ("plain", "role-play", "leading-context", "paraphrase", "many-shot", "refusal-suppression")
BUILT_IN = Path(__file__).with_name("attacks.json")


@dataclass(frozen=True, slots=True)
class Template:
    """One way to attack: texts with ``{prompt}`` where the seed goes.

    prompt: the user's last turn; holds ``{prompt}``.
    history: (user, assistant) exchanges before it; may hold ``{prompt}``.
    rewrite: asked of the policy first, if given; its answer takes the seed's place in `prompt` and `history`.
    shots: how many of the policy's own harmful answers, to other seeds, stand before it as exchanges.
    """

    name: str
    family: str
    prompt: str
    history: History = ()
    rewrite: str | None = None
    shots: int = 0


@dataclass(frozen=True, slots=True)
class Attack:
    """A prompt made from a seed, and what came of it.

    seed: which seed, from 0. responses: the policy's answers to it. costs: theirs, in the cost model's units.
    """

    template: Template
    seed: int
    prompt: Prompt
    responses: list[str] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)

    @property
    def cost(self) -> float:
        """Mean over the answers: an attack that works once in many tries teaches little."""
        return sum(self.costs) / len(self.costs)


def read_templates(path: str | Path) -> list[Template]:
    """Templates from a JSON file: a list of objects with the fields of `Template`.

    Raises UserError naming file, entry and field.
    """
    path = Path(path)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected a JSON list of attack templates, found {error}") from None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: expected a JSON list of attack templates, found {type(entries).__name__}")
    templates = [_template(f"{path}, entry {number}", entry) for number, entry in enumerate(entries, start=1)]
    twice = [name for name, count in Counter(template.name for template in templates).items() if count > 1]
    if twice:
        raise UserError(f"{path}, field 'name': expected each name once, found '{twice[0]}' again")
    return templates


def _template(place: str, entry: object) -> Template:
    def wrong(name: str, expected: str) -> UserError:
        return UserError(f"{place}, field '{name}': expected {expected}")

    known = Template.__dataclass_fields__
    if not isinstance(entry, dict) or set(entry) - set(known):
        raise UserError(f"{place}: expected an object with {', '.join(known)}")
    for name in ("name", "family", "prompt"):
        if not isinstance(entry.get(name), str) or not entry[name].strip():
            raise wrong(name, "a string that is not empty")
    if entry["family"] not in FAMILIES:
        raise wrong("family", f"one of {', '.join(FAMILIES)}")
    history = entry.get("history", [])
    if not isinstance(history, list) or not all(
        isinstance(turns, list) and len(turns) == 2 and all(isinstance(text, str) for text in turns)
        for turns in history
    ):
        raise wrong("history", "a list of [user, assistant] texts")
    rewrite, shots = entry.get("rewrite"), entry.get("shots", 0)
    if rewrite is not None and not (isinstance(rewrite, str) and _fields(rewrite) == ["prompt"]):
        raise wrong("rewrite", "a text with {prompt} once")
    if not isinstance(shots, int) or isinstance(shots, bool) or shots < 0:
        raise wrong("shots", "a whole number, 0 or more")
    if _fields(entry["prompt"]) != ["prompt"]:
        raise wrong("prompt", "a text with {prompt} once")
    if any(set(_fields(text) or ["prompt"]) != {"prompt"} for turns in history for text in turns):
        raise wrong("history", "texts without fields other than {prompt}")
    return Template(
        entry["name"], entry["family"], entry["prompt"], tuple((user, assistant) for user, assistant in history),
        rewrite, shots,
    )  # fmt: skip


def _fields(text: str) -> list[str | None]:
    try:
        return [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
    except ValueError:
        return [None]


def write_attack(template: Template, seed: int, record: Prompt, wording: str, shots: History, label: str) -> Attack:
    """The seed `record` in a template, marked as red-team and with where it came from.

    wording: what stands for the seed: its own prompt, or the policy's rewriting. shots: exchanges to put first. The
    seed's own history stays in front of everything.
    """
    history = tuple(
        (user.format(prompt=wording), assistant.format(prompt=wording)) for user, assistant in template.history
    )
    prompt = Prompt(
        prompt=template.prompt.format(prompt=wording),
        red_team=True,
        category=record.category,
        history=record.history + shots + history,
        origin=f"{label}: {template.name} on seed {seed}" + (f" ({record.origin})" if record.origin else ""),
    )
    return Attack(template, seed, prompt)


def choose(
    attacks: Sequence[Attack],
    threshold: float,
    keep: int,
    max_per_seed: int,
    max_similarity: float,
    pool: Sequence[Prompt] = (),
) -> list[Attack]:
    """The successful attacks worth keeping, the costliest first.

    Successful: mean cost above `threshold`. From the costliest on, one is kept unless its text is in `pool` already,
    its seed has `max_per_seed` kept (0: any number), or it is more similar than `max_similarity` to a kept one; until
    there are `keep` (0: all).
    """
    ranked = sorted((attack for attack in attacks if attack.cost > threshold), key=lambda attack: -attack.cost)
    features = [_features(attack.prompt) for attack in attacks]
    seen = Counter(feature for one in features for feature in one)
    # What most attacks share, such as a template's own words, says nothing about how alike two of them are.
    weights = {feature: math.log((1 + len(attacks)) / count) for feature, count in seen.items()}
    known = {_normal(prompt) for prompt in pool}
    kept: list[Attack] = []
    kept_features: list[set[str]] = []
    per_seed: Counter[int] = Counter()
    for attack in ranked:
        text, mine = _normal(attack.prompt), _features(attack.prompt)
        if text in known or (max_per_seed and per_seed[attack.seed] == max_per_seed):
            continue
        if any(similarity(mine, other, weights) > max_similarity for other in kept_features):
            continue
        known.add(text)
        per_seed[attack.seed] += 1
        kept.append(attack)
        kept_features.append(mine)
        if len(kept) == keep:
            break
    return kept


def similarity(one: set[str], other: set[str], weights: dict[str, float]) -> float:
    """Weighted Jaccard index of two sets of features: 0 nothing in common, 1 the same."""
    union = sum(weights[feature] for feature in one | other)
    return sum(weights[feature] for feature in one & other) / union if union else 1.0


def _normal(prompt: Prompt) -> str:
    turns = [text for exchange in prompt.history for text in exchange] + [prompt.prompt]
    return "\n".join(" ".join(text.casefold().split()) for text in turns)


def _features(prompt: Prompt) -> set[str]:
    """Its words and pairs of neighbouring words."""
    words = _normal(prompt).split()
    return {*words, *(f"{one} {two}" for one, two in zip(words, words[1:], strict=False))}
