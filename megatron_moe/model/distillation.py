"""Losses that compare a model with its teacher: on logits, on a layer's output, on its router.

The first is computed together with the cross entropy, because both need the logits. The others add
their gradient to a tensor that the model computes anyway, and leave its value as it is.

Shape letters of this module:

    N  tokens    V  this tp rank's part of the vocabulary    E  num_moe_experts
    s  positions of this rank    B  micro_batch_size    D  hidden_size
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_moe.model.cross_entropy import label_logits
from megatron_moe.runtime.compiled import compiled_on_cuda

SMALLEST_MEAN_SQUARE = 1e-12
"""Mean square of a layer's output below which an error is not measured relative to it."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """This rank's part of the vocabulary."""

    real: int
    """Number of columns that are tokens; later columns pad the vocabulary and are ignored."""
    tp_group: ProcessGroup
    """Ranks that share the vocabulary, in order."""


def taught_cross_entropy(
    logits_NV: Tensor,
    teacher_NV: Tensor,
    label_N: Tensor,
    *,
    temperature: float,
    vocabulary: Vocabulary,
) -> tuple[Tensor, Tensor]:
    """Return each token's cross entropy and its divergence from the teacher, both fp32 ``(N,)``.

    The divergence is the Kullback-Leibler divergence of the model's distribution from the
    teacher's, both at a temperature, times the temperature's square (arXiv 1503.02531, section 2),
    so that its gradient keeps its size when the temperature changes.

    The backward pass reuses the memory of ``logits_NV``, so it can run only once, and nothing else
    may read these logits after it. All tp ranks return the same.
    """
    return _TaughtCrossEntropy.apply(logits_NV, teacher_NV, label_N, temperature, vocabulary)


class _TaughtCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: Tensor,
        teacher_NV: Tensor,
        label_N: Tensor,
        temperature: float,
        vocabulary: Vocabulary,
    ) -> tuple[Tensor, Tensor]:
        group, real = vocabulary.tp_group, vocabulary.real
        column_N = label_N - group.rank() * logits_NV.shape[1]
        most_2N = _largest(logits_NV, teacher_NV, real)
        if group.size() > 1:
            dist.all_reduce(most_2N, op=dist.ReduceOp.MAX, group=group)
        sums_4N = _sums(logits_NV, teacher_NV, most_2N, temperature, real)
        sums_5N = torch.cat([sums_4N, label_logits(logits_NV, column_N)[None]])
        if group.size() > 1:
            dist.all_reduce(sums_5N, group=group)
        most_N, teacher_most_N = most_2N
        sum_N, warm_N, teacher_N, difference_N, label_logit_N = sums_5N
        log_sum_N = sum_N.log() + most_N
        log_warm_N = warm_N.log() + most_N / temperature
        log_teacher_N = teacher_N.log() + teacher_most_N / temperature
        divergence_N = difference_N / teacher_N - log_teacher_N + log_warm_N
        ctx.temperature, ctx.real = temperature, real
        ctx.save_for_backward(logits_NV, teacher_NV, column_N, log_sum_N, log_warm_N, log_teacher_N)
        return log_sum_N - label_logit_N, temperature**2 * divergence_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        logits_NV, *others = ctx.saved_tensors
        grad_NV = logits_NV.detach()
        overwrite: Any = _overwrite_with_gradients
        overwrite(grad_NV, *others, *grads, ctx.temperature, ctx.real)
        return grad_NV, None, None, None, None


@compiled_on_cuda
def _largest(logits_NV: Tensor, teacher_NV: Tensor, real: int) -> Tensor:
    """Return each token's largest logit of both models, ``(2, N)``; -inf without real columns."""
    if not real:
        return logits_NV.new_full((2, len(logits_NV)), -torch.inf, dtype=torch.float32)
    return torch.stack([x_NV[:, :real].float().amax(dim=1) for x_NV in (logits_NV, teacher_NV)])


@compiled_on_cuda
def _sums(
    logits_NV: Tensor, teacher_NV: Tensor, most_2N: Tensor, temperature: float, real: int
) -> Tensor:
    """Return sums over this rank's columns, ``(4, N)``.

    They are the exponentials of the logits, of the logits at the temperature and of the teacher's
    at the temperature, each relative to the largest; and the last ones times the difference of the
    logits at the temperature.
    """
    wide_NV = logits_NV[:, :real].float()
    teacher_NV = teacher_NV[:, :real].float()
    below_NV = wide_NV - most_2N[0][:, None]
    share_NV = ((teacher_NV - most_2N[1][:, None]) / temperature).exp()
    sums = (
        below_NV.exp(),
        (below_NV / temperature).exp(),
        share_NV,
        share_NV * (teacher_NV - wide_NV) / temperature,
    )
    return torch.stack([x_NV.sum(dim=1) for x_NV in sums])


@compiled_on_cuda
def _overwrite_with_gradients(
    logits_NV: Tensor,
    teacher_NV: Tensor,
    column_N: Tensor,
    log_sum_N: Tensor,
    log_warm_N: Tensor,
    log_teacher_N: Tensor,
    grad_N: Tensor,
    divergence_grad_N: Tensor,
    temperature: float,
    real: int,
) -> None:
    """Overwrite the logits with their gradient; zero in padding columns."""
    column_V = torch.arange(logits_NV.shape[1], device=logits_NV.device)
    wide_NV = logits_NV.float()
    chosen_NV = (column_V == column_N[:, None]).float()
    softmax_NV = (wide_NV - log_sum_N[:, None]).exp()
    warm_NV = (wide_NV / temperature - log_warm_N[:, None]).exp()
    teacher_NV = (teacher_NV.float() / temperature - log_teacher_N[:, None]).exp()
    # The divergence has a factor temperature ** 2, and the logits a factor 1 / temperature.
    of_divergence_NV = (warm_NV - teacher_NV) * (temperature * divergence_grad_N)[:, None]
    grad_NV = (softmax_NV - chosen_NV) * grad_N[:, None] + of_divergence_NV
    logits_NV.copy_(torch.where(column_V < real, grad_NV, 0))


def toward_output(output_sBD: Tensor, target_sBD: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Return the output with the gradient of a squared error added, and each token's error.

    The error of a token is ``|output - target|^2 / |target|^2``, in fp32 ``(s, B)``.

    Args:
        output_sBD: Output of a MoE layer.
        target_sBD: Output of the teacher's FFN on the same input.
        weight: Factor of each token's error in the loss.
    """
    difference_sBD = output_sBD.detach().float() - target_sBD.float()
    floor = SMALLEST_MEAN_SQUARE * target_sBD.shape[-1]
    square_sB = target_sBD.float().square().sum(dim=-1).clamp_min(floor)
    grad_sBD = difference_sBD * (2 * weight / square_sB)[..., None]
    error_sB = difference_sBD.square().sum(dim=-1) / square_sB
    return _AddGradient.apply(output_sBD, grad_sBD.to(output_sBD.dtype)), error_sB


def toward_shares(logits_NE: Tensor, share_NE: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Return router logits with the gradient of a divergence added, and each token's divergence.

    The divergence is that of the softmax over all experts from each expert's share, fp32 ``(N,)``.

    Args:
        logits_NE: Logits of a router, ``(..., E)``.
        share_NE: Shares of the experts in the teacher's output; those of a token sum to 1.
        weight: Factor of each token's divergence in the loss.
    """
    log_NE = logits_NE.detach().float().log_softmax(dim=-1)
    divergence_N = (torch.xlogy(share_NE, share_NE) - share_NE * log_NE).sum(dim=-1)
    grad_NE = weight * (log_NE.exp() - share_NE)
    return _AddGradient.apply(logits_NE, grad_NE.to(logits_NE.dtype)), divergence_N


class _AddGradient(torch.autograd.Function):
    """Return a tensor unchanged, and add a constant to its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = ctx.saved_tensors
        return grads[0] + grad, None
