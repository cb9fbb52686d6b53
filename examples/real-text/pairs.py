"""The real pairs: reading, a split by prompt that is the same for ever, and the files that the stages read.

Error messages give rows by number and never a text: the texts are offensive.
"""

import hashlib
import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from megatron_safe.errors import UserError

FIELDS = ("prompt", "safe_response", "unsafe_response")
SPLIT_SEED = 0  # fixed before the first run
SPECIAL_TOKENS = ("<pad>", "</s>", "<sep>")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt, of which exactly one was labelled safe."""

    prompt: str
    safe_response: str
    unsafe_response: str

    @property
    def group(self) -> str:
        """What prompts have in common that differ in case, punctuation and spaces alone."""
        return " ".join(re.findall(r"\w+", self.prompt.casefold()))


def read_pairs(path: Path) -> list[Pair]:
    """The JSON array of {prompt, safe_response, unsafe_response}. Raises UserError by row and field."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--pairs {path}: expected a JSON array of pairs, found {type(error).__name__}") from None
    if not isinstance(rows, list) or not rows:
        raise UserError(f"--pairs {path}: expected a JSON array of pairs, found {type(rows).__name__} without rows")
    for number, row in enumerate(rows):
        for name in FIELDS:
            value = row.get(name) if isinstance(row, dict) else None
            if not isinstance(value, str) or (name == "prompt" and not value.strip()):
                found = type(value).__name__
                raise UserError(f"--pairs {path}, row {number}, field '{name}': expected a text, found {found}")
    return [Pair(*(row[name] for name in FIELDS)) for row in rows]


def split(pairs: Sequence[Pair], share: float, seed: int = SPLIT_SEED) -> tuple[list[Pair], list[Pair]]:
    """(training, held-out) pairs. Whole groups of equal prompts, in an order given by their hash, are held out until
    at least `share` of the pairs are; the order of the rows does not matter."""
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(pair.group, []).append(pair)
    train, held_out = [], []
    for name in sorted(groups, key=lambda name: _hash(f"{seed} {name}")):
        (held_out if len(held_out) < share * len(pairs) else train).extend(groups[name])
    if {pair.group for pair in train} & {pair.group for pair in held_out}:
        raise AssertionError("a prompt is on both sides of the split")
    if not train or not held_out:
        raise UserError(f"--pairs: expected at least two different prompts, found {len(groups)}")
    return train, held_out


def repeated_responses(train: Sequence[Pair], held_out: Sequence[Pair]) -> int:
    """How many of the held-out answers stand word for word in the training part too, under another prompt."""
    seen = {text for pair in train for text in (pair.safe_response, pair.unsafe_response)}
    return sum(text in seen for pair in held_out for text in (pair.safe_response, pair.unsafe_response))


def comparison(pair: Pair) -> dict:
    """A row for the `cost` stage. Which answer comes first is up to a hash; nobody was asked which helps more."""
    safe = _hash(f"order {pair.prompt} {pair.safe_response} {pair.unsafe_response}") % 2
    return {
        "prompt": pair.prompt,
        f"response_{safe}": pair.safe_response,
        f"response_{1 - safe}": pair.unsafe_response,
        "better_response_id": None,
        "safer_response_id": safe,
        "is_response_0_safe": safe == 0,
        "is_response_1_safe": safe == 1,
    }


def thinned(pairs: Iterable[Pair], share: float, draw: random.Random) -> list[Pair]:
    """The pairs with this share of their words left out at random: what dropout would be in a model that had it."""

    def thin(text: str) -> str:
        return "".join(word for word in re.findall(r"\s*\S+", text) if draw.random() >= share)

    return [
        Pair(thin(pair.prompt).strip() or pair.prompt, thin(pair.safe_response), thin(pair.unsafe_response))
        for pair in pairs
    ]


def write_jsonl(path: Path, rows: Iterable[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def write_tokenizer(folder: Path, pairs: Sequence[Pair], vocab_size: int) -> None:
    """Learn a byte-level BPE vocabulary from the pairs (lower case, as the baseline's) and save it for the stages."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, special_tokens=list(SPECIAL_TOKENS), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator((getattr(pair, name) for pair in pairs for name in FIELDS), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config) + "\n", encoding="utf-8")


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")
