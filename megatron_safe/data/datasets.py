"""Records, tokenised once and kept in memory; ``batch(indices)`` gives the padded tensors of some of them.

A dialogue that is too long loses its oldest exchanges until it fits. What does not fit without any: a row whose prompt
is too long is left out (a cut prompt asks something else), and a response that is too long is cut and loses its EOS, so
that no model learns to stop in mid-sentence. ``report()`` counts all three. Shapes as in `batches`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from megatron_safe.data.batches import Context, TokenBatch, collate, encode_contexts
from megatron_safe.data.records import Comparison, Demonstration, Prompt
from megatron_safe.data.tokenizer import Tokenizer
from megatron_safe.errors import UserError

_CHUNK = 4096  # records tokenised at a time: as fast as all at once, without holding all of them as Python lists
_SIGNS = {True: 1.0, False: -1.0, None: 0.0}  # by whether a response is safe
_Row = tuple[np.ndarray, int]  # int32 tokens (a third of a list's memory or less), prompt length


class DemonstrationDataset:
    """Prompts with a response to imitate.

    max_length: tokens of prompt, response and EOS together.
    turns: which of the assistant's turns to learn from, the "last" one (the response) or "all" that were not dropped.
    Raises UserError for a bad template, or where no prompt leaves room for a response. `records` are those kept.
    """

    def __init__(
        self,
        records: Sequence[Demonstration],
        tokenizer: Tokenizer,
        template: str,
        max_length: int,
        turns: Literal["last", "all"] = "last",
    ):
        self.records: list[Demonstration] = []
        self._rows: list[_Row] = []
        self._turns: list[list[tuple[int, int]]] | None = [] if turns == "all" else None
        self._pad_id = tokenizer.pad_id
        self._counts = _Counts("demonstrations", "prompt and response", max_length, len(records))
        for record, context, response in _encode(tokenizer, template, records, max_length, "response"):
            if self._counts.fits(context, for_response=1):
                self.records.append(record)
                self._rows.append(self._counts.cut(context.tokens, response, tokenizer.eos_id))
                if self._turns is not None:
                    self._turns.append(context.turns)
        self._counts.check_any_kept()

    def __len__(self) -> int:
        return len(self._rows)

    def report(self) -> str:
        """One line: rows kept, left out and shortened."""
        return self._counts.line()

    def lengths(self, indices: Sequence[int]) -> list[int]:
        """Tokens of the rows at `indices`."""
        return [len(self._rows[i][0]) for i in indices]

    def batch(self, indices: Sequence[int], length: int | None = None, multiple: int = 1) -> TokenBatch:
        """The rows at `indices`, on the CPU; `length` and `multiple` as in `collate`."""
        turns = None if self._turns is None else [self._turns[i] for i in indices]
        return collate([self._rows[i] for i in indices], self._pad_id, length, multiple, turns)


@dataclass(frozen=True, slots=True, eq=False)
class ComparisonBatch:
    """Two responses to each prompt, both batches of the same width, rows in the same order.

    For the reward model: first = better (more helpful), second = worse.
    For the cost model: first = unsafer, second = safer.
    In both the model learns to score `first` above `second`: a high reward is helpful, a high cost is harmful.

    first_sign_B, second_sign_B: float32, +1 where that response is safe by itself, -1 where it is not: the s of the
    cost loss (paper, section 3.2). 0 where nobody said.
    """

    first: TokenBatch
    second: TokenBatch
    first_sign_B: torch.Tensor
    second_sign_B: torch.Tensor

    def __len__(self) -> int:
        return len(self.first)

    def to(self, device: torch.device | str) -> "ComparisonBatch":
        return ComparisonBatch(
            self.first.to(device), self.second.to(device), self.first_sign_B.to(device), self.second_sign_B.to(device)
        )

    def select(self, rows: slice | Sequence[int] | torch.Tensor) -> "ComparisonBatch":
        """Some of the rows, as wide as before."""
        return ComparisonBatch(
            self.first.select(rows), self.second.select(rows), self.first_sign_B[rows], self.second_sign_B[rows]
        )


class ComparisonDataset:
    """Pairs of responses, ordered for the reward model or for the cost model (see `ComparisonBatch`).

    max_length: tokens of prompt, response and EOS together.
    which: "reward" orders by better_response_id, "cost" by safer_response_id; neither looks at the other's, which may
        be None. Its own is known in all records: ValueError where not.
    Raises UserError for a bad template, or where no prompt leaves room for a response. `records` are those kept.
    """

    def __init__(
        self,
        records: Sequence[Comparison],
        tokenizer: Tokenizer,
        template: str,
        max_length: int,
        which: Literal["reward", "cost"],
    ):
        if which not in ("reward", "cost"):
            raise ValueError(f"which: expected 'reward' or 'cost', found {which!r}")
        self.records: list[Comparison] = []
        self._pairs: list[tuple[_Row, _Row]] = []
        self._signs: list[tuple[float, float]] = []
        self._pad_id = tokenizer.pad_id
        self._counts = _Counts("comparisons", "prompt and response", max_length, len(records))
        wanted = "better_response_id" if which == "reward" else "safer_response_id"
        if missing := sum(getattr(record, wanted) is None for record in records):
            raise ValueError(f"comparisons: expected {wanted} in every record, found {missing} without it")
        fields = "response_0", "response_1"
        for record, context, *responses in _encode(tokenizer, template, records, max_length, *fields):
            if self._counts.fits(context, for_response=1):
                first = record.better_response_id if which == "reward" else 1 - record.safer_response_id
                rows = [self._counts.cut(context.tokens, response, tokenizer.eos_id) for response in responses]
                signs = [_SIGNS[is_safe] for is_safe in record.is_safe]
                self.records.append(record)
                self._pairs.append((rows[first], rows[1 - first]))
                self._signs.append((signs[first], signs[1 - first]))
        self._counts.check_any_kept()

    def __len__(self) -> int:
        return len(self._pairs)

    def report(self) -> str:
        """One line: rows kept, left out and shortened."""
        return self._counts.line()

    def lengths(self, indices: Sequence[int]) -> list[int]:
        """Tokens of the pairs at `indices`, both rows together."""
        return [sum(len(tokens) for tokens, _ in self._pairs[i]) for i in indices]

    def batch(self, indices: Sequence[int], length: int | None = None, multiple: int = 1) -> ComparisonBatch:
        """The pairs at `indices`, on the CPU; `length` and `multiple` as in `collate`."""
        # Collated together, so that both sides get the same width.
        both = collate([self._pairs[i][side] for side in (0, 1) for i in indices], self._pad_id, length, multiple)
        signs_B2 = torch.tensor([self._signs[i] for i in indices], dtype=torch.float32)
        count = len(indices)
        return ComparisonBatch(
            both.select(slice(0, count)), both.select(slice(count, None)), signs_B2[:, 0], signs_B2[:, 1]
        )


@dataclass(frozen=True, slots=True, eq=False)
class PromptBatch:
    """Prompts to be answered: `tokens` holds prompts alone (prompt_lengths_B == lengths_B); red_team_B is bool."""

    tokens: TokenBatch
    red_team_B: torch.Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def to(self, device: torch.device | str) -> "PromptBatch":
        return PromptBatch(self.tokens.to(device), self.red_team_B.to(device))

    def select(self, rows: slice | Sequence[int] | torch.Tensor) -> "PromptBatch":
        """Some of the rows, as wide as before."""
        return PromptBatch(self.tokens.select(rows), self.red_team_B[rows])


class PromptDataset:
    """Prompts for rollouts and evaluation.

    max_prompt_length: tokens of the templated prompt with its history, BOS included.
    Raises UserError for a bad template, or where no prompt is short enough. `records` are those kept.
    """

    def __init__(self, records: Sequence[Prompt], tokenizer: Tokenizer, template: str, max_prompt_length: int):
        self.records: list[Prompt] = []
        self._dropped: list[int] = []
        self._rows: list[_Row] = []
        self._pad_id = tokenizer.pad_id
        self._counts = _Counts("prompts", "a prompt", max_prompt_length, len(records))
        for record, context in _encode(tokenizer, template, records, max_prompt_length):
            if self._counts.fits(context):
                self.records.append(record)
                self._dropped.append(context.dropped)
                self._rows.append((np.array(context.tokens, dtype=np.int32), len(context.tokens)))
        self._counts.check_any_kept()

    def __len__(self) -> int:
        return len(self._rows)

    def shortened(self) -> list[Prompt]:
        """`records` with what is left of their histories."""
        pairs = zip(self.records, self._dropped, strict=True)
        return [replace(record, history=record.history[dropped:]) if dropped else record for record, dropped in pairs]

    def report(self) -> str:
        """One line: rows kept, left out and shortened."""
        return self._counts.line()

    def batch(self, indices: Sequence[int], length: int | None = None, multiple: int = 1) -> PromptBatch:
        """The prompts at `indices`, on the CPU; `length` and `multiple` as in `collate`."""
        tokens = collate([self._rows[i] for i in indices], self._pad_id, length, multiple)
        return PromptBatch(tokens, torch.tensor([self.records[i].red_team for i in indices], dtype=torch.bool))


def _encode(
    tokenizer: Tokenizer, template: str, records: Sequence[Any], max_length: int, *responses: str
) -> Iterator[tuple]:
    """(record, context, tokens of each field named in `responses`) of every record.

    Old exchanges are dropped until the longest response fits with its EOS, so that it is cut only if it must be.
    """
    for start in range(0, len(records), _CHUNK):
        chunk = records[start : start + _CHUNK]
        columns = [tokenizer.encode_batch([getattr(record, name) for record in chunk]) for name in responses]
        room = [max_length] * len(chunk)
        if columns:
            room = [max_length - 1 - max(map(len, row)) for row in zip(*columns, strict=True)]
        contexts = encode_contexts(tokenizer, template, chunk, room)
        yield from zip(chunk, contexts, *columns, strict=True)


class _Counts:
    """What became of the rows of one dataset."""

    def __init__(self, name: str, limited: str, max_length: int, total: int):
        self.name, self.limited, self.max_length, self.total = name, limited, max_length, total
        self.left_out = 0
        self.cut_responses = 0
        self.cut_dialogues = 0

    def fits(self, context: Context, for_response: int = 0) -> bool:
        """Whether a row can be kept that needs at least so many tokens after its context; counts what it cost."""
        fits = len(context.tokens) + for_response <= self.max_length
        self.left_out += not fits
        self.cut_dialogues += fits and context.dropped > 0
        return fits

    def cut(self, prompt: list[int], response: list[int], eos_id: int) -> _Row:
        """The row of a prompt that fits, with EOS, or cut at max_length; counts it where cut."""
        tokens = [*prompt, *response, eos_id]
        self.cut_responses += len(tokens) > self.max_length
        return np.array(tokens[: self.max_length], dtype=np.int32), len(prompt)

    def check_any_kept(self) -> None:
        if self.left_out == self.total:
            raise UserError(
                f"{self.name}: expected at least one row with room for {self.limited} within {self.max_length} tokens, "
                f"found none in {self.total}"
            )

    def line(self) -> str:
        line = (
            f"{self.name}: kept {self.total - self.left_out} of {self.total} rows, up to {self.max_length} tokens for "
            f"{self.limited}; {self.left_out} left out (prompt too long), {self.cut_responses} responses cut"
        )
        return line + (f", {self.cut_dialogues} lost their oldest turns" if self.cut_dialogues else "")
