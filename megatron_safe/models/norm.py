"""RMSNorm that may stand on rows of a sequence-parallel region; Megatron-Core's own without Transformer Engine may not.

Legend: T tokens (any leading dimensions), h the size that is normalised.
"""

import torch


class RMSNorm(torch.nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich, 2019), with the arguments of Megatron-Core's norms."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))
        # Each tensor-parallel rank sees some of the tokens: `finalize_model_grads` adds their gradients up.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x_Th: torch.Tensor) -> torch.Tensor:
        if x_Th.is_cuda:
            return torch.nn.functional.rms_norm(x_Th, self.weight.shape, self.weight, self.eps)
        return _RMSNorm.apply(x_Th, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """In fp32 throughout. On a CPU `rms_norm` is a dozen passes over memory, and keeps what half of them made."""

    @staticmethod
    def forward(ctx, x_Th, weight_h, eps: float):
        wide_Th = x_Th.float()
        norm_T1 = torch.linalg.vector_norm(wide_Th, dim=-1, keepdim=True)
        rstd_T1 = norm_T1.square_().div_(x_Th.size(-1)).add_(eps).rsqrt_()
        ctx.save_for_backward(x_Th, weight_h, rstd_T1)
        return (wide_Th * rstd_T1).mul_(weight_h).to(x_Th.dtype)

    @staticmethod
    def backward(ctx, slope_Th):
        x_Th, weight_h, rstd_T1 = ctx.saved_tensors
        normed_Th, slope_Th = x_Th.float() * rstd_T1, slope_Th.float()
        product_Th = slope_Th * normed_Th
        weight_slope_h = product_Th.flatten(0, -2).sum(dim=0).to(weight_h.dtype)
        # dx = rstd (w dy - x̂ mean(w dy x̂)), x̂ = rstd x
        mean_T1 = (product_Th @ weight_h.float()).div_(-x_Th.size(-1)).unsqueeze(-1)
        x_slope_Th = (slope_Th * weight_h).addcmul_(normed_Th, mean_T1).mul_(rstd_T1)
        return x_slope_Th.to(x_Th.dtype), weight_slope_h, None
