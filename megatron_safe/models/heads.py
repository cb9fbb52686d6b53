"""What is read off a role's last stage.

Legend: B rows, S tokens read, N = S B tokens sequence first (as Megatron splits them), h hidden size.
"""

import torch

from megatron_safe.kernels.linear_logprob import linear_logprob
from megatron_safe.models.llama import Llama


def head_inputs(module: Llama, hidden_SBh: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [N, h] (this rank's rows, with sequence parallelism) and the output weight [V/p, h]."""
    return hidden_SBh.flatten(0, 1), module.output_weight()


def head_options(module: Llama) -> dict:
    """How the `linear_*` kernels are to treat a module's language head."""
    return dict(
        group=module.pg_collection.tp,
        valid_vocab=module.true_vocab_size,
        sequence_parallel=module.config.sequence_parallel,
        gradient_accumulation_fusion=module.config.gradient_accumulation_fusion,
    )


def sequence_first(x_BS: torch.Tensor) -> torch.Tensor:
    """[B, S] -> [N], in the order of the hidden states."""
    return x_BS.t().flatten()


def token_log_probs(
    module: Llama, hidden_SBh: torch.Tensor, targets_BS: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Log-probability of each target, [B, S] fp32, equal on all TP ranks."""
    log_probs_N, _ = linear_logprob(
        *head_inputs(module, hidden_SBh), sequence_first(targets_BS), temperature, **head_options(module)
    )
    return log_probs_N.view(targets_BS.size(1), targets_BS.size(0)).t()


def last_token_scores(scores_BS: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
    """[B] fp32: the score at the last token of each row, where reward and cost models judge the whole answer."""
    return scores_BS.gather(1, lengths_B[:, None] - 1)[:, 0].float()
