"""Rows of tokens: how a dialogue and a response become one row, and how rows become a padded batch.

Shapes: B rows, L columns (tokens), T = L - 1 columns (next-token predictions: column t predicts token t + 1).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from megatron_safe.data.records import History
from megatron_safe.data.templates import CHAT, parse_template
from megatron_safe.data.tokenizer import Tokenizer
from megatron_safe.errors import UserError


@dataclass(frozen=True, slots=True, eq=False)
class TokenBatch:
    """Rows of tokens on one device, padded on the right.

    tokens_BL: int64 token ids, pad_id from each row's length on.
    prompt_lengths_B: int64, tokens of the templated prompt, BOS included.
    lengths_B: int64, tokens of the whole row, response and EOS included.
    earlier_turns_BT: bool [B, L-1], columns that predict the assistant's turns within the prompt (EOS included), where
        those shall be learnt from too; None where none shall.
    """

    tokens_BL: torch.Tensor
    prompt_lengths_B: torch.Tensor
    lengths_B: torch.Tensor
    earlier_turns_BT: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens_BL)

    def to(self, device: torch.device | str) -> "TokenBatch":
        return TokenBatch(*(each if each is None else each.to(device) for each in self._tensors()))

    def select(self, rows: slice | Sequence[int] | torch.Tensor) -> "TokenBatch":
        """Some of the rows, as wide as before."""
        return TokenBatch(*(each if each is None else each[rows] for each in self._tensors()))

    def _tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self.tokens_BL, self.prompt_lengths_B, self.lengths_B, self.earlier_turns_BT

    @property
    def response_mask_BT(self) -> torch.Tensor:
        """bool [B, L-1]: column t is True where token t + 1 belongs to the response (its EOS included)."""
        next_1T = torch.arange(1, self.tokens_BL.shape[1], device=self.tokens_BL.device)[None, :]
        return (next_1T >= self.prompt_lengths_B[:, None]) & (next_1T < self.lengths_B[:, None])

    @property
    def learnt_mask_BT(self) -> torch.Tensor:
        """bool [B, L-1]: the response, and the earlier turns if they are asked for."""
        mask_BT = self.response_mask_BT
        return mask_BT if self.earlier_turns_BT is None else mask_BT | self.earlier_turns_BT


class Dialogue(Protocol):
    """What records have in common that ask for a response."""

    prompt: str
    history: History


class Context(NamedTuple):
    """All that stands before a response.

    tokens: BOS included. turns: where each of the assistant's turns in it begins and ends (its EOS included). dropped:
    how many exchanges were dropped, the oldest ones.
    """

    tokens: list[int]
    turns: list[tuple[int, int]]
    dropped: int = 0


def encode_contexts(
    tokenizer: Tokenizer, template: str, dialogues: Sequence[Dialogue], room: Sequence[int]
) -> list[Context]:
    """Each dialogue in its template, without as many of its oldest exchanges as it takes to fit `room` tokens.

    One whose prompt alone does not fit is longer than that. Errors as in `encode_prompts`.
    """
    found = _encode(tokenizer, template, [(each.history, each.prompt) for each in dialogues])
    dropped, waiting = 0, range(len(dialogues))
    while waiting := [i for i in waiting if len(found[i].tokens) > room[i] and len(dialogues[i].history) > dropped]:
        dropped += 1
        shorter = _encode(tokenizer, template, [(dialogues[i].history[dropped:], dialogues[i].prompt) for i in waiting])
        for i, context in zip(waiting, shorter, strict=True):
            found[i] = context._replace(dropped=dropped)
    return found


def encode_prompts(
    tokenizer: Tokenizer, template: str, prompts: Sequence[str], histories: Sequence[History] | None = None
) -> list[list[int]]:
    """Each prompt in its template, after its history if there is one, with BOS before it where the tokenizer has one.

    Special tokens that the template names (``<|im_start|>``) become those tokens; the same characters in a text stay
    plain text. With the template "chat", the checkpoint's own, a row has a BOS only where that template writes it.
    UserError for a bad template, or a prompt of no tokens.
    """
    if histories is None:
        histories = [()] * len(prompts)
    return [context.tokens for context in _encode(tokenizer, template, list(zip(histories, prompts, strict=True)))]


def encode_prompt(tokenizer: Tokenizer, template: str, prompt: str, history: History = ()) -> list[int]:
    """`encode_prompts` of one prompt."""
    return encode_prompts(tokenizer, template, [prompt], [history])[0]


def encode_dialogue(
    tokenizer: Tokenizer, template: str, prompt: str, response: str, add_eos: bool = True, history: History = ()
) -> tuple[list[int], int]:
    """Tokens of a templated prompt and its response, and the prompt's length in tokens.

    Prompt and response are encoded apart, so the row begins with exactly the tokens that a rollout begins with.
    """
    prompt_ids = encode_prompt(tokenizer, template, prompt, history)
    eos = [tokenizer.eos_id] if add_eos else []
    return prompt_ids + tokenizer.encode(response) + eos, len(prompt_ids)


def _encode(tokenizer: Tokenizer, template: str, dialogues: list[tuple[History, str]]) -> list[Context]:
    contexts = (_encode_chat if template == CHAT else _encode_formatted)(tokenizer, template, dialogues)
    if not all(context.tokens for context in contexts):
        # Without one token there is nothing to predict the first token of the response from.
        raise UserError("prompt: expected at least one token, found one that the tokenizer drops entirely")
    return contexts


def _encode_formatted(tokenizer: Tokenizer, template: str, dialogues: list[tuple[History, str]]) -> list[Context]:
    """With a format string. An answer has the tokens that it had as a response: encoded apart, and EOS after it."""
    once, before, after = parse_template(template)
    first, right = tokenizer.split_special(once + before), tokenizer.split_special(after)
    later = ["", tokenizer.eos_id, *tokenizer.split_special(before)]
    bos = [] if tokenizer.bos_id is None or first[:2] == ["", tokenizer.bos_id] else [tokenizer.bos_id]
    asked = []
    for history, prompt in dialogues:
        for at, text in enumerate([*(user for user, _ in history), prompt]):
            *head, left = later if at else first
            # The plain text around a user's is encoded together with it, as tokens may span the seam.
            asked.append([*head, f"{left}{text}{right[0]}", *right[1:]])
    asked = iter(tokenizer.encode_parts(asked))
    answers = iter(tokenizer.encode_batch([answer for history, _ in dialogues for _, answer in history]))
    contexts = []
    for history, _ in dialogues:
        tokens, turns = [*bos, *next(asked)], []
        for _ in history:
            begin = len(tokens)
            tokens += next(answers)
            turns.append((begin, len(tokens) + 1))
            tokens += next(asked)
        contexts.append(Context(tokens, turns))
    return contexts


def _encode_chat(tokenizer: Tokenizer, template: str, dialogues: list[tuple[History, str]]) -> list[Context]:
    """With the checkpoint's own template: the tokens of its rendering as a whole, answers included."""
    if tokenizer.chat is None:
        raise ValueError("the template 'chat' needs a tokenizer from load_tokenizer(path, 'chat')")
    rows = []
    for history, prompt in dialogues:
        pieces, texts = tokenizer.chat.fill(prompt, history)
        row, edges = tokenizer.split_special(pieces[0]), []
        for at, (text, piece) in enumerate(zip(texts, pieces[1:], strict=True)):
            piece = tokenizer.split_special(piece)
            begin, end = row, [*row[:-1], row[-1] + text]
            row = [*end[:-1], end[-1] + piece[0], *piece[1:]]
            if at % 2:
                if not piece[0].strip() and piece[1:2] == [tokenizer.eos_id]:  # what ends the turn is a part of it
                    end = [*row[: len(end)], tokenizer.eos_id, ""]
                edges += [begin, end]
        rows.append([row, *edges])
    encoded = iter(tokenizer.encode_parts([row for each in rows for row in each]))
    contexts = []
    for _, *edges in rows:
        tokens = next(encoded)
        # A token may span the edge of a turn: it is the turn's at the beginning, and not at the end.
        places = [_common(tokens, next(encoded)) for _ in edges]
        contexts.append(Context(tokens, list(zip(places[::2], places[1::2], strict=True))))
    return contexts


def _common(first: list[int], second: list[int]) -> int:
    """How many tokens two rows begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(first), len(second)))


def collate(
    rows: Sequence[tuple[Sequence[int], int]],
    pad_id: int,
    length: int | None = None,
    multiple: int = 1,
    turns: Sequence[Sequence[tuple[int, int]]] | None = None,
) -> TokenBatch:
    """One batch from (tokens, prompt length) rows, on the CPU.

    length: the width L; None takes the longest row's, rounded up to a multiple of `multiple` (sequence parallelism
        needs a multiple of the tensor-parallel size).
    turns: of each row, where the assistant's turns in its prompt begin and end; for `TokenBatch.earlier_turns_BT`.

    ValueError for no rows, or a row longer than `length`.
    """
    if not rows:
        raise ValueError("collate needs at least one row")
    longest = max(len(tokens) for tokens, _ in rows)
    if length is None:
        length = -(-longest // multiple) * multiple
    if longest > length:
        raise ValueError(f"a row of {longest} tokens does not fit a length of {length}")
    tokens_BL = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    for row_L, (tokens, _) in zip(tokens_BL, rows, strict=True):
        row_L[: len(tokens)] = torch.as_tensor(tokens)
    earlier_turns_BT = None
    if turns is not None:
        earlier_BL = torch.zeros(len(rows), length, dtype=torch.bool)
        for row_L, spans in zip(earlier_BL, turns, strict=True):
            for begin, end in spans:
                row_L[begin:end] = True
        earlier_turns_BT = earlier_BL[:, 1:]
    return TokenBatch(
        tokens_BL=tokens_BL,
        prompt_lengths_B=torch.tensor([prompt_length for _, prompt_length in rows]),
        lengths_B=torch.tensor([len(tokens) for tokens, _ in rows]),
        earlier_turns_BT=earlier_turns_BT,
    )
