"""What a Llama makes of every token of rows that are equally long.

Legend: B rows, S tokens, V vocabulary, h hidden size.
"""

import torch

from megatron_safe.models.llama import Llama
from megatron_safe.models.packing import Sequences, pack


def whole(tokens_BS: torch.Tensor) -> Sequences:
    """Rows without padding, read everywhere."""
    rows, length = tokens_BS.shape
    return Sequences(tokens_BS, torch.full((rows,), length), torch.ones((rows, length), dtype=torch.bool))


def hidden_states(module: Llama, tokens_BS: torch.Tensor) -> torch.Tensor:
    """[B, S, h] of a language model, [B, S] of a scalar head, from one pack."""
    (rows,) = pack(whole(tokens_BS), tokens_BS.numel())
    output = module(rows)
    assert torch.equal(rows.places_N.cpu(), torch.arange(tokens_BS.numel()))  # equal lengths stay in order
    return output.unflatten(0, tokens_BS.shape)


def outputs(module: Llama, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Logits [B, S, V / p] or scores [B, S]."""
    output = hidden_states(module, tokens_BS)
    return output if module.head == "scalar" else module.logits(output)
