"""Losses of the reward model and the cost model on pairs of answers (Safe RLHF, section 3.2; L2 term: authors' code).

Shapes: B pairs. Scores are float32 or float64; every function returns one loss per pair and leaves the mean to the
caller, who knows the size of the global batch.
"""

import torch
import torch.nn.functional as F


def reward_loss_B(better_B: torch.Tensor, worse_B: torch.Tensor, l2: float) -> torch.Tensor:
    """-log σ(R_w - R_l) + l2 · mean(R_w², R_l²), per pair.

    better_B, worse_B: [B] rewards of the more and the less helpful answer to the same prompt. l2: `regularization` in
    the authors' code; 0 for none.
    """
    return -F.logsigmoid(better_B - worse_B) + _score_l2_B(better_B, worse_B, l2)


def cost_loss_B(
    unsafer_B: torch.Tensor,
    safer_B: torch.Tensor,
    unsafer_sign_B: torch.Tensor,
    safer_sign_B: torch.Tensor,
    l2: float,
) -> torch.Tensor:
    """-log σ(C_unsafer - C_safer) - log σ(-s_safer C_safer) - log σ(-s_unsafer C_unsafer) + l2 · mean(C²), per pair.

    The last two terms pin the zero of the cost: C > 0 is unsafe, C < 0 is safe.

    unsafer_B, safer_B: [B] costs of the more and the less harmful answer to the same prompt. unsafer_sign_B,
    safer_sign_B: [B], any signed dtype, +1 where that answer alone is safe, -1 where it is unsafe, and 0 where nobody
    said, which drops its term. Both answers of a pair may be safe, or both unsafe.
    """
    ranking_B = -F.logsigmoid(unsafer_B - safer_B)
    classification_B = _sign_loss_B(safer_B, safer_sign_B) + _sign_loss_B(unsafer_B, unsafer_sign_B)
    return ranking_B + classification_B + _score_l2_B(unsafer_B, safer_B, l2)


def _sign_loss_B(cost_B: torch.Tensor, sign_B: torch.Tensor) -> torch.Tensor:
    return -F.logsigmoid(-sign_B * cost_B) * sign_B.abs()


def _score_l2_B(first_B: torch.Tensor, second_B: torch.Tensor, l2: float) -> torch.Tensor:
    return l2 * torch.stack([first_B, second_B]).square().mean(dim=0)
