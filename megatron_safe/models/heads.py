"""What is read off a role's last stage.

Legend: B rows, S tokens read, V/p vocabulary shard (`v`).
"""

import torch
from megatron.core import parallel_state

from megatron_safe.kernels.vocab_parallel_logprob import vocab_parallel_logprob


def token_log_probs(
    logits_BSv: torch.Tensor, targets_BS: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target and entropy at each position, both [B, S] fp32, equal on all TP ranks."""
    log_probs, entropy = vocab_parallel_logprob(
        logits_BSv.flatten(0, 1), targets_BS.flatten(), temperature, parallel_state.get_tensor_model_parallel_group()
    )
    return log_probs.view_as(targets_BS), entropy.view_as(targets_BS)


def last_token_scores(scores_BS: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
    """[B] fp32: the score at the last token of each row, where reward and cost models judge the whole answer."""
    return scores_BS.gather(1, lengths_B[:, None] - 1)[:, 0].float()
