"""What is read off a language model's last stage.

Legend: N places that are read, h hidden size, V/p vocabulary rows of this tensor-parallel rank.
"""

import torch

from megatron_safe.kernels.linear_logprob import linear_logprob
from megatron_safe.models.llama import Llama


def head_options(module: Llama) -> dict:
    """How the `linear_*` kernels are to treat a module's language head."""
    return dict(
        group=module.pg_collection.tp,
        valid_vocab=module.true_vocab_size,
        gradient_accumulation_fusion=module.config.gradient_accumulation_fusion,
    )


def token_log_probs(
    module: Llama, hidden_Nh: torch.Tensor, targets_N: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Log-probability of each target, [N] fp32, equal on all TP ranks."""
    log_probs_N, _ = linear_logprob(
        hidden_Nh, module.output_weight(), targets_N, temperature, **head_options(module)
    )
    return log_probs_N
