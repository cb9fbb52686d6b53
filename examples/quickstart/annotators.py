"""Simulated annotators: noisy labels of pairs of answers, in the columns that PKU-SafeRLHF is published in.

As in the paper, helpfulness and harmlessness are labelled separately and nothing reconciles them: the more helpful
answer is often the unsafe one. All labels start from the truth (`judge.py`) and then err.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from judge import Judgement, harmful_pairs, judge
from world import World, write_jsonl

HELPFULNESS_SLOPE = 2.0  # P(response 1 preferred) = sigmoid(slope * (helpfulness_1 - helpfulness_0))
HARM_FLIP = 0.1  # probability of a wrong safe/unsafe label, and of a wrong choice of the safer answer
SOURCE = "tiny-world"

PKU_CATEGORIES = (
    "Endangering National Security", "Insulting Behavior", "Discriminatory Behavior", "Endangering Public Health",
    "Copyright Issues", "Violence", "Drugs", "Privacy Violation", "Economic Crime", "Mental Manipulation",
    "Human Trafficking", "Physical Harm", "Sexual Content", "Cybercrime", "Disrupting Public Order",
    "Environmental Damage", "Psychological Harm", "White-Collar Crime", "Animal Abuse",
)  # fmt: skip

# The world has BeaverTails' 14 categories, PKU-SafeRLHF 19 of its own: the nearest one, each used once.
TO_PKU = {
    "animal_abuse": "Animal Abuse",
    "child_abuse": "Physical Harm",
    "controversial_topics,politics": "Disrupting Public Order",
    "discrimination,stereotype,injustice": "Discriminatory Behavior",
    "drug_abuse,weapons,banned_substance": "Drugs",
    "financial_crime,property_crime,theft": "Economic Crime",
    "hate_speech,offensive_language": "Insulting Behavior",
    "misinformation_regarding_ethics,laws_and_safety": "Endangering Public Health",
    "non_violent_unethical_behavior": "Mental Manipulation",
    "privacy_violation": "Privacy Violation",
    "self_harm": "Psychological Harm",
    "sexually_explicit,adult_content": "Sexual Content",
    "terrorism,organized_crime": "Endangering National Security",
    "violence,aiding_and_abetting,incitement": "Violence",
}


def annotate(world: World, rows: Iterable[tuple[str, str, str]], seed: int) -> list[dict]:
    """Label pairs of answers.

    - `better_response_id`: Bradley-Terry in the difference of true helpfulness.
    - `is_response_i_safe`: the truth, flipped with probability 0.1; harm categories and severity agree with the label.
    - `safer_response_id`: the truly harmless one, flipped with probability 0.1; random where both or neither are
      harmful. Drawn apart from the safe/unsafe labels, so the two may contradict each other.

    Args:
        rows: (prompt, response_0, response_1), texts of this world's prompts and any answers.
        seed: the labels of a row depend on the seed, the row's texts and how often the same row came before, so adding
            rows does not change the labels of others.

    Raises:
        UserError: a prompt is not of this world.
    """
    seen: Counter[tuple[str, str, str]] = Counter()
    labelled = []
    for row in rows:
        labelled.append(_annotate(world, row, random.Random(f"annotate/{seed}/{seen[row]}/{row!r}")))
        seen[row] += 1
    return labelled


def _annotate(world: World, row: tuple[str, str, str], rng: random.Random) -> dict:
    prompt, *responses = row
    truth = [judge(world, prompt, response) for response in responses]
    labelled: dict = {"prompt": prompt, "response_0": responses[0], "response_1": responses[1], "prompt_source": SOURCE}
    for i, response in enumerate(responses):
        safe = truth[i].harmful == (rng.random() < HARM_FLIP)
        categories, severity = ((), 0) if safe else _describe_harm(world, prompt, response, rng)
        labelled |= {
            f"response_{i}_source": SOURCE,
            f"is_response_{i}_safe": safe,
            f"response_{i}_harm_category": {name: name in categories for name in PKU_CATEGORIES},
            f"response_{i}_severity_level": severity,
            f"response_{i}_sha256": hashlib.sha256(response.encode()).hexdigest(),
        }
    labelled["better_response_id"] = _more_helpful(truth, rng)
    labelled["safer_response_id"] = _safer(truth, rng)
    return labelled


def _describe_harm(world: World, prompt: str, response: str, rng: random.Random) -> tuple[set[str], int]:
    """Categories and severity (1 to 3, the number of harmful pairs) of an answer that was labelled unsafe."""
    found = harmful_pairs(world, response)
    if found:
        return {TO_PKU[category] for _, category in found}, min(len(found), 3)
    # A false alarm: the category that the prompt suggests, or any.
    return {TO_PKU[world.find(prompt).category or rng.choice(list(TO_PKU))]}, 1


def _more_helpful(truth: list[Judgement], rng: random.Random) -> int:
    difference = truth[1].helpfulness - truth[0].helpfulness
    return int(rng.random() < 1 / (1 + math.exp(-HELPFULNESS_SLOPE * difference)))


def _safer(truth: list[Judgement], rng: random.Random) -> int:
    if truth[0].harmful == truth[1].harmful:
        return rng.randint(0, 1)
    harmless = int(truth[0].harmful)
    return 1 - harmless if rng.random() < HARM_FLIP else harmless


def write_comparisons(path: str | Path, rows: Iterable[dict]) -> None:
    """Write what `annotate` returns as JSONL, one pair a line."""
    write_jsonl(path, rows)
