"""What `prepare_data.py inspect` says of records: counts, lengths, labels, duplicates and leaks. No text leaves here.

A dialogue's opening is its first user turn, a single-turn prompt itself. Texts are the same when their words are,
whatever the case, spaces and punctuation; nearly the same when the sets of their runs of five characters have a Jaccard
similarity of `NEAR`, about a word changed in ten (MinHash of `datasketch` finds the candidates, the runs decide).
"""

import re
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_safe.data.records import Comparison, Demonstration, Prompt
from megatron_safe.errors import UserError

NEAR = 0.7
_RUN = 5  # characters
_CHUNK = 1024
_LINE_SECONDS = 5.0
_WORD = re.compile(r"\w+")

Record = Demonstration | Comparison | Prompt


def progress(items: Iterable, what: str, total: int | None = None) -> Iterator:
    """The items, with a bar on a terminal and else a line every few seconds."""
    if sys.stderr.isatty():
        yield from tqdm(items, desc=what, total=total, dynamic_ncols=True, file=sys.stderr)
        return
    printed_at = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        if time.monotonic() - printed_at >= _LINE_SECONDS:
            print(f"{what} {done}{f'/{total}' if total else ''}", file=sys.stderr, flush=True)
            printed_at = time.monotonic()


def responses(record: Record) -> tuple[str, ...]:
    """The responses that a record has: none, one or two."""
    if isinstance(record, Comparison):
        return record.responses
    return (record.response,) if isinstance(record, Demonstration) else ()


def opening(record: Record) -> str:
    """The words of the first user turn: what a split keeps together, and what a leak shares."""
    return " ".join(words(record.history[0][0] if record.history else record.prompt))


def words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def count_words(texts: Sequence[str]) -> list[int]:
    """How many words each text has; stands in where there is no tokenizer."""
    return [len(words(text)) for text in texts]


def measure(records: Sequence[Record], lengths_of: Callable[[Sequence[str]], list[int]], unit: str) -> dict[str, Any]:
    """All that is said of records of one kind. lengths_of: of texts, in `unit`s."""
    openings = [opening(record) for record in progress(records, "openings", len(records))]
    exchanges = Counter(len(record.history) + 1 for record in records)
    found = {
        "rows": len(records),
        "exchanges": {str(n): count for n, count in sorted(exchanges.items())},
        "unit": unit,
        "lengths": {
            "prompt": spread(_lengths([record.prompt for record in records], "prompts", lengths_of)),
            "response": spread(_lengths([t for r in records for t in responses(r)], "responses", lengths_of)),
            "history": spread(
                _lengths([t for r in records for exchange in r.history for t in exchange], "history", lengths_of)
            ),
        },
        "duplicates": {
            "equal_rows": len(records) - len(set(records)),
            "openings": len(set(openings)),
            "near_openings": len(near_pairs(set(openings))),
        },
    }
    if isinstance(records[0], Comparison):
        found |= labels(records)
    if isinstance(records[0], Prompt):
        found["red_team"] = sum(record.red_team for record in records)
        found["categories"] = dict(Counter(record.category for record in records if record.category).most_common())
    return found


def _lengths(texts: list[str], what: str, lengths_of: Callable[[Sequence[str]], list[int]]) -> list[int]:
    starts = range(0, len(texts), _CHUNK)
    chunks = (lengths_of(texts[start : start + _CHUNK]) for start in progress(starts, what, len(starts)))
    return [length for chunk in chunks for length in chunk]


def spread(lengths: Sequence[int]) -> dict[str, Any] | None:
    """Mean, quantiles, and a histogram whose bins double; None for no texts."""
    if not lengths:
        return None
    edges = [0, 1, *(2**n for n in range(1, max(lengths).bit_length() + 1))]
    quantiles = np.percentile(lengths, [50, 95], method="inverted_cdf").tolist()
    return {
        "texts": len(lengths), "mean": sum(lengths) / len(lengths), "median": quantiles[0], "p95": quantiles[1],
        "longest": max(lengths), "edges": edges, "counts": np.histogram(lengths, edges)[0].tolist(),
    }  # fmt: skip


def labels(pairs: Sequence[Comparison]) -> dict[str, Any]:
    """Balance of both ids and of the flags, and how often the two questions have different answers.

    `safer_is_the_unsafe_one` counts pairs whose ids and flags contradict each other.
    """
    both = [pair for pair in pairs if pair.better_response_id is not None and pair.safer_response_id is not None]
    safe = Counter(flag for pair in pairs for flag in pair.is_safe)
    contrary = sum(
        pair.safer_response_id is not None
        and pair.is_safe[pair.safer_response_id] is False
        and pair.is_safe[1 - pair.safer_response_id] is True
        for pair in pairs
    )
    harms = Counter(name for pair in pairs for name in (*pair.response_0_categories, *pair.response_1_categories))
    return {
        "better_response_id": _balance(pair.better_response_id for pair in pairs),
        "safer_response_id": _balance(pair.safer_response_id for pair in pairs),
        "answers": {"safe": safe[True], "unsafe": safe[False], "not asked": safe[None]},
        "pairs": dict(Counter(_safety(pair) for pair in pairs).most_common()),
        "both_asked": len(both),
        "disagree": sum(pair.better_response_id != pair.safer_response_id for pair in both),
        "safer_is_the_unsafe_one": contrary,
        "categories": dict(harms.most_common()),
    }


def _balance(ids: Iterable[int | None]) -> dict[str, int]:
    counts = Counter(ids)
    return {"0": counts[0], "1": counts[1], "not asked": counts[None]}


def _safety(pair: Comparison) -> str:
    if None in pair.is_safe:
        return "not asked"
    return ("neither safe", "one safe", "both safe")[sum(pair.is_safe)]


def leaks(records: Sequence[Record], others: Sequence[Record]) -> dict[str, int]:
    """How many records have an opening of `others`, and how many of the rest one that is nearly the same."""
    openings, known = [opening(record) for record in records], {opening(record) for record in others}
    fresh = set(openings) - known
    near = {text for text, _ in near_pairs(fresh, known)}
    return {
        "rows": len(records),
        "same_opening": sum(text in known for text in openings),
        "near_opening": sum(text in near for text in openings),
    }


def near_pairs(texts: set[str], others: set[str] | None = None) -> set[tuple[str, str]]:
    """(text, other) that are nearly the same, each text once, with the first that is found.

    texts, others: as `opening` gives them. others: default the texts themselves, none with itself.
    Raises UserError where datasketch is missing.
    """
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError:
        raise UserError("near duplicates: finding them needs datasketch: pip install megatron-safe[data]") from None
    known, asked = sorted(texts if others is None else others), sorted(texts)
    runs = {text: _runs(text) for text in {*known, *asked}}
    made = MinHash.generator([run.encode() for run in found] for found in runs.values())
    sketches = dict(zip(runs, progress(made, "sketches", len(runs)), strict=True))
    index = MinHashLSH(threshold=NEAR - 0.2)  # it misses few that are this much nearer
    for text in known:
        index.insert(text, sketches[text])
    found = set()
    for text in progress(asked, "near duplicates", len(asked)):
        for other in sorted(index.query(sketches[text])):
            shared = len(runs[text] & runs[other])
            if other != text and shared >= NEAR * (len(runs[text]) + len(runs[other]) - shared):
                found.add((text, other))
                break
    return found


def _runs(text: str) -> set[str]:
    return {text[start : start + _RUN] for start in range(max(1, len(text) - _RUN + 1))}
