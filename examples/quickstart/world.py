"""The tiny world: a seeded generator of prompts and demonstrations whose true answers are known by construction.

A world draws, from the fixed words of `lexicon.py`, which steps are right for each benign topic and task, which pairs
of verb and noun are harmful in each harm category, and which advice is right there. What an answer is worth is decided
in `judge.py`; how annotators see it, in `annotators.py`. Everything is a pure function of its seeds.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import lexicon
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from megatron_safe.errors import UserError

Split = Literal["train", "dev", "test"]
Kind = Literal["benign", "red-team", "plain"]
Step = tuple[str, str]  # (verb, noun)

SPLIT_PERCENT = {"train": 60, "dev": 15, "test": 25}
SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")
ROLE_WORDS = ("USER:", "ASSISTANT:")

# The mixture of demonstrations: a supervised model trained on it answers about 53% of red-team prompts harmfully, the
# rate the paper starts from (0.5308). Fewer answers are harmful than comply, because many of them get no step right.
PROMPT_SHARES: dict[Kind, float] = {"benign": 0.5, "red-team": 0.35, "plain": 0.15}
BENIGN_FORMS = {"refuse": 0.06, "vague": 0.08, "comply": 0.86}
COMPLY_SHARES: dict[Kind, float] = {"red-team": 0.69, "plain": 0.57}
OTHER_HARMFUL_FORMS = {"leak": 0.14, "refuse": 0.31, "vague": 0.10, "redirect": 0.45}  # of what does not comply
RIGHT_PROBABILITY = (0.25, 0.65)  # each answer draws its own probability of a right step from this range
REPEAT_PROBABILITY, NEAR_MISS_PROBABILITY = 0.1, 0.2  # of a wrong step; the rest are filler


@dataclass(frozen=True)
class WorldPrompt:
    """One prompt and the structure it was built from.

    Attributes:
        text: the words, separated by single spaces, at most 17; with `USER:` and `ASSISTANT:` at most 19 tokens.
        kind: `benign`; or harmful, either `plain` or framed to slip through (`red-team`).
        category: the harm category, one of BeaverTails' 14 names; None for a benign prompt.
        topic, task: what a benign prompt asks for; None for a harmful one.
        verb, object: the question's words.
        prefix, suffix: indices into `lexicon.PREFIXES` (0: none) and `lexicon.SUFFIXES`. Benign prompts have them too.
    """

    text: str
    kind: Kind
    category: str | None
    topic: str | None
    task: str | None
    verb: str
    object: str
    prefix: int
    suffix: int


class World:
    """The facts and the prompts of one world.

    Attributes:
        facts: (topic, task) -> the four right steps.
        harmful_steps: harm category -> its four harmful steps.
        advice_steps: harm category -> its two right pieces of advice.
        harmful_pairs: (verb, noun) -> harm category: the harmful steps and the deeds that harmful prompts ask for.
    """

    def __init__(self, world_seed: int = 0):
        self.world_seed = world_seed
        rng = random.Random(f"tiny-world/{world_seed}/facts")
        advice = rng.sample(sorted(product(lexicon.ADVICE_VERBS, lexicon.ADVICE_NOUNS)), 2 * len(lexicon.CATEGORIES))
        self.harmful_steps: dict[str, tuple[Step, ...]] = {}
        self.advice_steps: dict[str, tuple[Step, ...]] = {}
        self.harmful_pairs: dict[Step, str] = {}
        ask_verbs: dict[str, tuple[str, ...]] = {}
        for i, (category, (objects, parts)) in enumerate(lexicon.CATEGORIES.items()):
            verbs = rng.sample(lexicon.HARMFUL_VERBS, 4)
            nouns = [*parts, rng.choice(parts)]
            self.harmful_steps[category] = tuple(zip(verbs, nouns, strict=True))
            self.advice_steps[category] = tuple(advice[2 * i : 2 * i + 2])
            ask_verbs[category] = tuple(rng.sample(lexicon.ASK_VERBS, 4))
            for pair in (*self.harmful_steps[category], *product(ask_verbs[category], objects)):
                self.harmful_pairs[pair] = category
        self.facts: dict[tuple[str, str], tuple[Step, ...]] = {}
        for topic in lexicon.TOPICS:
            self._draw_facts(rng, topic)

        self._prompts = {prompt.text: prompt for prompt in self._all_prompts(ask_verbs)}
        self._pools: dict[tuple[Split, Kind], list[WorldPrompt]] = {}
        for prompt in self._prompts.values():
            self._pools.setdefault((self._split(prompt), prompt.kind), []).append(prompt)

    def _draw_facts(self, rng: random.Random, topic: str) -> None:
        """Four steps for each task: verbs all different, nouns different within a task, none of them harmful."""
        _, parts, borrowed = lexicon.TOPICS[topic]
        pool = lexicon.HARMFUL_VERBS if topic == lexicon.SOUNDS_HARMFUL else lexicon.BENIGN_VERBS
        nouns = [borrowed, *rng.sample(parts, 3), *rng.sample(parts, 4)]
        while True:
            steps = tuple(zip(rng.sample(pool, len(nouns)), nouns, strict=True))
            if not self.harmful_pairs.keys() & steps:
                break
        for i, task in enumerate(lexicon.TASKS):
            self.facts[topic, task] = steps[4 * i : 4 * i + 4]

    def _all_prompts(self, ask_verbs: dict[str, tuple[str, ...]]) -> Iterable[WorldPrompt]:
        questions = [
            (None, topic, task, verb, thing)
            for topic, (objects, _, _) in lexicon.TOPICS.items()
            for task, verbs in lexicon.TASKS.items()
            for verb, thing in product(verbs, objects)
        ] + [
            (category, None, None, verb, thing)
            for category, (objects, _) in lexicon.CATEGORIES.items()
            for verb, thing in product(ask_verbs[category], objects)
        ]
        for category, topic, task, verb, thing in questions:
            question = lexicon.QUESTION.format(verb=verb, object=thing)
            for (i, prefix), (j, suffix) in product(enumerate(lexicon.PREFIXES), enumerate(lexicon.SUFFIXES)):
                text = " ".join(part for part in (prefix, question, suffix) if part)
                kind: Kind = "benign" if category is None else "red-team" if i else "plain"
                yield WorldPrompt(text, kind, category, topic, task, verb, thing, i, j)

    def _split(self, prompt: WorldPrompt) -> Split:
        """Held out by the combination of what is asked and how, so that a test prompt is new but its words are not."""
        asked = (prompt.category or prompt.topic, prompt.object, prompt.verb)
        key = repr((self.world_seed, *asked, prompt.prefix, prompt.suffix))
        percent = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 100
        if percent < SPLIT_PERCENT["train"]:
            return "train"
        return "dev" if percent < SPLIT_PERCENT["train"] + SPLIT_PERCENT["dev"] else "test"

    def words(self) -> list[str]:
        """All words of prompts and answers, in an order that is the same for every world seed."""
        return list(lexicon.WORDS)

    def asked_steps(self, prompt: WorldPrompt) -> tuple[Step, ...]:
        """The four steps that do what the prompt asks."""
        if prompt.category is not None:
            return self.harmful_steps[prompt.category]
        return self.facts[prompt.topic, prompt.task]

    def advice(self, prompt: WorldPrompt) -> tuple[Step, ...]:
        """The two right pieces of advice for a harmful prompt; none for a benign one."""
        return self.advice_steps[prompt.category] if prompt.category is not None else ()

    def find(self, text: str) -> WorldPrompt:
        """The prompt with this text.

        Raises:
            UserError: this world has no such prompt.
        """
        try:
            return self._prompts[text]
        except KeyError:
            raise UserError(f"tiny world {self.world_seed}: expected one of its prompts, found {text!r}") from None

    def prompts(self, split: Split, kind: Kind, round: int, n: int, seed: int) -> list[WorldPrompt]:
        """Draw `n` prompts, each once until the pool is used up, then each once again.

        Args:
            split: `train`; `dev`, to tune on; or `test`, for final figures only. They share no prompt.
            kind: `benign`, `red-team` or `plain` (harmful without a framing).
            round: 1, 2 or 3: how many prefixes the training prompts may have (`lexicon.OPEN_PREFIXES`). Development
                and test prompts have all of them in every round.
            n: at most about 1,300 test prompts a kind are distinct (about 170 plain ones).
            seed: another seed draws another sample; a larger `n` continues the same one.

        Raises:
            ValueError: an unknown split, kind or round.
        """
        if (split, kind) not in self._pools or round not in lexicon.OPEN_PREFIXES:
            raise ValueError(f"no prompts for split {split!r}, kind {kind!r}, round {round!r}")
        prefixes = lexicon.OPEN_PREFIXES[round if split == "train" else max(lexicon.OPEN_PREFIXES)]
        pool = [prompt for prompt in self._pools[split, kind] if prompt.prefix < prefixes]
        rng = random.Random(f"tiny-world/{self.world_seed}/{split}/{kind}/{prefixes}/{seed}")
        drawn: list[WorldPrompt] = []
        while len(drawn) < n:
            drawn += rng.sample(pool, len(pool))
        return drawn[:n]

    def demonstrations(self, n: int, seed: int, clean: bool = False) -> list[tuple[str, str]]:
        """Draw `n` (prompt, response) pairs for supervised training, on training prompts with every prefix.

        Args:
            clean: only right steps, in compliance or redirection. These stand for pretraining: they put the facts in.
        """
        rng = random.Random(f"tiny-world/{self.world_seed}/demonstrations/{seed}/{clean}")
        counts = {kind: int(n * share) for kind, share in PROMPT_SHARES.items()}
        counts["benign"] += n - sum(counts.values())
        last_round = max(lexicon.OPEN_PREFIXES)
        prompts: list[WorldPrompt] = []
        for kind, count in counts.items():
            prompts += self.prompts("train", kind, last_round, count, rng.getrandbits(32))
        rng.shuffle(prompts)
        return [(prompt.text, self._demonstrate(rng, prompt, clean)) for prompt in prompts]

    def _demonstrate(self, rng: random.Random, prompt: WorldPrompt, clean: bool) -> str:
        form = _draw_form(rng, prompt.kind, clean)
        if form == "vague":
            return rng.choice(lexicon.VAGUE)
        if form == "refuse":
            return rng.choice(lexicon.REFUSALS)
        right = 1.0 if clean else rng.uniform(*RIGHT_PROBABILITY)
        if form == "comply":
            steps = self._draw_steps(rng, prompt, self.asked_steps(prompt), rng.randint(2 if clean else 1, 4), right)
            return f"{rng.choice(lexicon.OPENERS)} {_join(rng, steps)}"
        if form == "redirect":
            steps = self._draw_steps(rng, prompt, self.advice(prompt), rng.randint(1, 2), right)
        else:  # a leak: one step of what was asked, by itself or beside a wrong one
            steps = [rng.choice(self.asked_steps(prompt))]
            steps += [self._wrong_step(rng, prompt, steps) for _ in range(rng.randint(0, 1))]
            rng.shuffle(steps)
        return f"{rng.choice(lexicon.REFUSALS)} {rng.choice(lexicon.BRIDGES)} {_join(rng, steps)}"

    def _draw_steps(
        self, rng: random.Random, prompt: WorldPrompt, right_steps: tuple[Step, ...], n: int, right: float
    ) -> list[Step]:
        """`n` steps, each with probability `right` the next of the right ones in random order."""
        unused = rng.sample(right_steps, len(right_steps))
        steps: list[Step] = []
        for _ in range(n):
            steps.append(unused.pop() if rng.random() < right else self._wrong_step(rng, prompt, steps))
        return steps

    def _wrong_step(self, rng: random.Random, prompt: WorldPrompt, said: list[Step]) -> Step:
        """A step that is worth nothing and, unless it repeats one, harmless."""
        draw = rng.random()
        if said and draw < REPEAT_PROBABILITY:
            return rng.choice(said)
        if draw < REPEAT_PROBABILITY + NEAR_MISS_PROBABILITY:
            if prompt.category is None:  # right for the topic's other task
                other = next(task for task in lexicon.TASKS if task != prompt.task)
                return rng.choice([s for s in self.facts[prompt.topic, other] if s not in self.asked_steps(prompt)])
            while True:  # the category's nouns with another verb
                step = (rng.choice(lexicon.HARMFUL_VERBS), rng.choice(lexicon.CATEGORIES[prompt.category][1]))
                if step not in self.harmful_pairs:
                    return step
        return rng.choice(lexicon.FILLER_VERBS), rng.choice(lexicon.FILLER_NOUNS)


def _draw_form(rng: random.Random, kind: Kind, clean: bool) -> str:
    if kind == "benign":
        return "comply" if clean else _draw(rng, BENIGN_FORMS)
    if rng.random() < COMPLY_SHARES[kind]:
        return "comply"
    return "redirect" if clean else _draw(rng, OTHER_HARMFUL_FORMS)


def _draw(rng: random.Random, shares: dict[str, float]) -> str:
    return rng.choices(list(shares), list(shares.values()))[0]


def _join(rng: random.Random, steps: list[Step]) -> str:
    words: list[str] = []
    for verb, noun in steps:
        words += [rng.choice(lexicon.CONNECTIVES)] if words else []
        words += [verb, lexicon.ARTICLE, noun]
    return " ".join(words)


def write_tokenizer(world: World, folder: str | Path) -> None:
    """Write a Hugging Face word-level `tokenizer.json` and its `tokenizer_config.json` into `folder`.

    Ids: `<pad>` 0, `</s>` 1, `<unk>` 2, `USER:` 3, `ASSISTANT:` 4, then `world.words()`.
    """
    vocabulary = {word: i for i, word in enumerate((*SPECIAL_TOKENS, *ROLE_WORDS, *world.words()))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_demonstrations(path: str | Path, demonstrations: Iterable[tuple[str, str]]) -> None:
    """Write JSONL rows `{"prompt", "response"}`."""
    write_jsonl(path, ({"prompt": prompt, "response": response} for prompt, response in demonstrations))


def write_prompts(path: str | Path, prompts: Iterable[WorldPrompt]) -> None:
    """Write JSONL rows `{"prompt", "red_team", "category"}`; every harmful prompt, framed or plain, is `red_team`."""
    write_jsonl(path, ({"prompt": p.text, "red_team": p.kind != "benign", "category": p.category} for p in prompts))


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """Write one JSON object a line, making the folder if there is none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
