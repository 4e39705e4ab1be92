"""Compute vocabulary-parallel cross entropy on CUDA without an fp32 copy of the logits.

Shape letters of this module:

    N  tokens    V  this tp rank's part of the vocabulary

The forward pass reads the logits once and saves each token's log-sum-exp. The backward pass
overwrites the logits with their gradients. Both compute in fp32 inside compiled functions. On a CPU
these would take several passes, so CPU runs use Megatron-Core's function.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_moe.runtime.compiled import compiled_on_cuda


def cross_entropy(
    logits_NV: Tensor, label_N: Tensor, *, real: int, tp_group: ProcessGroup
) -> Tensor:
    """Return each token's loss in fp32, ``(N,)``, the same on every tp rank.

    The backward pass reuses the logits' memory, so it can run only once, and nothing else may read
    the logits after it.

    Args:
        logits_NV: This tp rank's logits; contiguous.
        label_N: Token ids of the whole vocabulary.
        real: Number of columns that are tokens; later columns pad the vocabulary and are ignored.
        tp_group: Ranks that share the vocabulary, in order.
    """
    return _CrossEntropy.apply(logits_NV, label_N, real, tp_group)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, label_N: Tensor, real: int, tp_group: ProcessGroup
    ) -> Tensor:
        column_N = label_N - tp_group.rank() * logits_NV.shape[1]
        most_N, sum_N = largest_and_sum(logits_NV, real)
        shared_N = most_N
        if tp_group.size() > 1:
            shared_N = most_N.clone()
            dist.all_reduce(shared_N, op=dist.ReduceOp.MAX, group=tp_group)
        sums_2N = torch.stack(
            [sum_N * (most_N - shared_N).exp(), label_logits(logits_NV, column_N)]
        )
        if tp_group.size() > 1:
            dist.all_reduce(sums_2N, group=tp_group)
        log_sum_N = sums_2N[0].log() + shared_N
        ctx.real = real
        ctx.save_for_backward(logits_NV, column_N, log_sum_N)
        return log_sum_N - sums_2N[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        logits_NV, column_N, log_sum_N = ctx.saved_tensors
        grad_NV = logits_NV.detach()
        overwrite_with_gradients(grad_NV, column_N, log_sum_N, grads[0], ctx.real)
        return grad_NV, None, None, None


def largest_and_sum(logits_NV: Tensor, real: int) -> tuple[Tensor, Tensor]:
    """Return each token's largest logit, and the sum of exponentials relative to it, in fp32.

    A rank without real columns returns -inf and zero.
    """
    if not real:
        zero_N = logits_NV.new_zeros(len(logits_NV), dtype=torch.float32)
        return zero_N - float("inf"), zero_N
    return _largest_and_sum(logits_NV, real)


@compiled_on_cuda
def _largest_and_sum(logits_NV: Tensor, real: int) -> tuple[Tensor, Tensor]:
    wide_NV = logits_NV[:, :real].float()
    most_N = wide_NV.amax(dim=1)
    return most_N, (wide_NV - most_N[:, None]).exp().sum(dim=1)


def label_logits(logits_NV: Tensor, column_N: Tensor) -> Tensor:
    """Return the logit of each token's label in fp32; zero if another rank holds that column."""
    width = logits_NV.shape[1]
    local_N = (column_N >= 0) & (column_N < width)
    logit_N1 = logits_NV.gather(1, column_N.clamp(0, width - 1)[:, None])
    return torch.where(local_N, logit_N1[:, 0].float(), 0)


@compiled_on_cuda
def overwrite_with_gradients(
    logits_NV: Tensor, column_N: Tensor, log_sum_N: Tensor, grad_N: Tensor, real: int
) -> None:
    """Overwrite the logits with ``(softmax - onehot) * grad``; zero in padding columns."""
    column_V = torch.arange(logits_NV.shape[1], device=logits_NV.device)
    softmax_NV = (logits_NV.float() - log_sum_N[:, None]).exp()
    chosen_NV = (column_V == column_N[:, None]).float()
    grad_NV = (softmax_NV - chosen_NV) * grad_N[:, None]
    logits_NV.copy_(torch.where(column_V < real, grad_NV, 0))
