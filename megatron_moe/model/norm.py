"""RMSNorm without Transformer Engine that works under sequence parallelism.

Shape letters: D hidden_size or head width; ``...`` whatever comes before it.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm whose weight tells Megatron-Core to sum its gradient over tp.

    Under sequence parallelism each tp rank normalises other tokens, so the weight's gradient is a
    sum over ranks; Megatron-Core looks for the ``sequence_parallel`` mark to form it.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010

    def forward(self, x: Tensor) -> Tensor:
        """``x / rms(x) * weight`` along the last axis, computed in fp32 at least."""
        if x.is_cuda:  # one kernel, which keeps what the function below keeps
            return super().forward(x)
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """On CPU torch composes this of single operations and keeps what most of them made."""

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
