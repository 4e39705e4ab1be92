"""RMSNorm without Transformer Engine, with support for sequence and tensor parallelism.

Shape letters: D hidden_size or head dim; h heads of this tp rank; ``...`` any leading axes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
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


class HeadsRMSNorm(torch.nn.Module):
    """RMSNorm of query or key over all heads at once, which tp ranks share (OLMoE).

    Args:
        config: Configuration of the model.
        hidden_size: Width of one head (D).
        eps: Added to the mean square.
        heads: Heads of all tp ranks.
        tp_group: The ranks that share the heads.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float,
        *,
        heads: int,
        tp_group: dist.ProcessGroup,
    ) -> None:
        super().__init__()
        self.eps, self.width, self.tp_group = eps, heads * hidden_size, tp_group
        own = self.width // tp_group.size()
        self.weight = torch.nn.Parameter(torch.empty(own, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x / rms(x) * weight`` for ``x`` of ``(..., h, D)``; rms is over all heads."""
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        squares = wide.square().sum(dim=(-2, -1), keepdim=True)
        # Each rank adds to the sum, and each uses it: the gradient is summed over ranks as well.
        squares = reduce_from_tensor_model_parallel_region(squares, group=self.tp_group)
        squares = copy_to_tensor_model_parallel_region(squares, group=self.tp_group)
        unit = wide * (squares / self.width + self.eps).rsqrt()
        return unit.to(x.dtype) * self.weight.unflatten(0, x.shape[-2:])

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Return the weight as a shard of the weight of all heads, for checkpoints."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True), prefix, {"weight": 0}, sharded_offsets,
            tp_group=self.tp_group, dp_cp_group=(metadata or {})["dp_cp_group"],
        )  # fmt: skip


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
