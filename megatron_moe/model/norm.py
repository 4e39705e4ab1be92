"""RMSNorm without Transformer Engine, with support for sequence parallelism.

Shape letters: D hidden_size or head dim; ``...`` any leading axes.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with a weight whose gradient Megatron-Core sums over tp.

    With sequence parallelism each tp rank normalizes different tokens, so the weight's gradient is
    a sum over ranks; Megatron-Core computes it for weights with the flag ``sequence_parallel``.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x / rms(x) * weight`` along the last axis, computed in at least fp32."""
        if x.is_cuda:  # one kernel that saves the same tensors as the function below
            return super().forward(x)
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """RMSNorm for CPUs, where torch composes it of many operations and saves their results."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scale = (norm.square_() / x.shape[-1] + eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, scale)
        return torch.mul(x, scale).mul_(weight_D).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight_D, scale = ctx.saved_tensors
        unit = x * scale
        product = grads[0] * unit
        weight_grad_D = product.flatten(0, -2).sum(dim=0).to(weight_D.dtype)
        along = (product @ weight_D.to(product.dtype))[..., None].div_(x.shape[-1])
        grad = torch.mul(grads[0], weight_D).to(unit.dtype)
        return grad.sub_(unit.mul_(along)).mul_(scale).to(x.dtype), weight_grad_D, None
