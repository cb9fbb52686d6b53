"""Rows of tokens: how a prompt and a response become one row, and how rows become a padded batch.

Shapes: B rows, L columns (tokens), T = L - 1 columns (next-token predictions: column t predicts token t + 1).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_safe.data.templates import CHAT, parse_template
from megatron_safe.data.tokenizer import Tokenizer
from megatron_safe.errors import UserError


@dataclass(frozen=True, slots=True, eq=False)
class TokenBatch:
    """Rows of tokens on one device, padded on the right.

    tokens_BL: int64 token ids, pad_id from each row's length on.
    prompt_lengths_B: int64, tokens of the templated prompt, BOS included.
    lengths_B: int64, tokens of the whole row, response and EOS included.
    """

    tokens_BL: torch.Tensor
    prompt_lengths_B: torch.Tensor
    lengths_B: torch.Tensor

    def __len__(self) -> int:
        return len(self.tokens_BL)

    def to(self, device: torch.device | str) -> "TokenBatch":
        return TokenBatch(self.tokens_BL.to(device), self.prompt_lengths_B.to(device), self.lengths_B.to(device))

    def select(self, rows: slice | Sequence[int] | torch.Tensor) -> "TokenBatch":
        """Some of the rows, as wide as before."""
        return TokenBatch(self.tokens_BL[rows], self.prompt_lengths_B[rows], self.lengths_B[rows])

    @property
    def response_mask_BT(self) -> torch.Tensor:
        """bool [B, L-1]: column t is True where token t + 1 belongs to the response (its EOS included)."""
        next_1T = torch.arange(1, self.tokens_BL.shape[1], device=self.tokens_BL.device)[None, :]
        return (next_1T >= self.prompt_lengths_B[:, None]) & (next_1T < self.lengths_B[:, None])


def encode_prompts(tokenizer: Tokenizer, template: str, prompts: Sequence[str]) -> list[list[int]]:
    """Each prompt in its template, with BOS before it where the tokenizer has one.

    Special tokens that the template names (``<|im_start|>``) become those tokens; the same characters in a prompt stay
    plain text. With the template "chat", the checkpoint's own, a row has a BOS only where that template writes it.
    UserError for a bad template, or a prompt of no tokens.
    """
    if template == CHAT:
        if tokenizer.chat is None:
            raise ValueError("the template 'chat' needs a tokenizer from load_tokenizer(path, 'chat')")
        before, after = tokenizer.chat.before, tokenizer.chat.after
        prompts = [tokenizer.chat.fill(prompt) for prompt in prompts]
    else:
        before, after = parse_template(template)
    *head, left = tokenizer.split_special(before)
    right, *tail = tokenizer.split_special(after)
    # The plain text around the prompt is encoded together with it, as tokens may span the seam.
    rows = tokenizer.encode_parts([[*head, f"{left}{prompt}{right}", *tail] for prompt in prompts])
    if template != CHAT and tokenizer.bos_id is not None and head[:2] != ["", tokenizer.bos_id]:
        rows = [[tokenizer.bos_id, *row] for row in rows]
    if not all(rows):  # without one token there is nothing to predict the first token of the response from
        raise UserError("prompt: expected at least one token, found one that the tokenizer drops entirely")
    return rows


def encode_prompt(tokenizer: Tokenizer, template: str, prompt: str) -> list[int]:
    """`encode_prompts` of one prompt."""
    return encode_prompts(tokenizer, template, [prompt])[0]


def encode_dialogue(
    tokenizer: Tokenizer, template: str, prompt: str, response: str, add_eos: bool = True
) -> tuple[list[int], int]:
    """Tokens of a templated prompt and its response, and the prompt's length in tokens.

    Prompt and response are encoded apart, so the row begins with exactly the tokens that a rollout begins with.
    """
    prompt_ids = encode_prompt(tokenizer, template, prompt)
    eos = [tokenizer.eos_id] if add_eos else []
    return prompt_ids + tokenizer.encode(response) + eos, len(prompt_ids)


def collate(
    rows: Sequence[tuple[Sequence[int], int]], pad_id: int, length: int | None = None, multiple: int = 1
) -> TokenBatch:
    """One batch from (tokens, prompt length) rows, on the CPU.

    length: the width L; None takes the longest row's, rounded up to a multiple of `multiple` (sequence parallelism
        needs a multiple of the tensor-parallel size).

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
    return TokenBatch(
        tokens_BL=tokens_BL,
        prompt_lengths_B=torch.tensor([prompt_length for _, prompt_length in rows]),
        lengths_B=torch.tensor([len(tokens) for tokens, _ in rows]),
    )
