"""Gradients of weights, added to data parallelism's fp32 buffers by the products themselves.

On CUDA Apex has a kernel for it, whose name the last function here takes on a CPU. What Apex has
not: the first product of a step overwrites, so its buffer need be neither zeroed nor read, which
are two passes over as many bytes as all gradients have.

Shape letters: R rows (tokens), I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def add_product(main_grad: Tensor, out_grad_RO: Tensor, in_RI: Tensor) -> None:
    """Add the gradient of ``F.linear(in, weight)`` to its buffer, ``(O, I)``."""
    first = begin_products(main_grad)
    if main_grad.is_cuda and main_grad.dtype != in_RI.dtype:
        add_widened(main_grad, out_grad_RO, in_RI, first=first)
    elif main_grad.dtype != in_RI.dtype:
        product = out_grad_RO.t() @ in_RI
        main_grad.copy_(product) if first else main_grad.add_(product)
    elif first:
        torch.mm(out_grad_RO.t(), in_RI, out=main_grad)
    else:
        main_grad.addmm_(out_grad_RO.t(), in_RI)


def begin_products(main_grad: Tensor) -> bool:
    """Mark a buffer as one that products write to. Return whether the next one must overwrite."""
    first = getattr(main_grad, "stale", False)
    setattr(main_grad, "stale", False)  # noqa: B010 - Tensor has no such attribute
    setattr(main_grad, "has_products", True)  # noqa: B010
    return first


def add_widened(main_grad: Tensor, out_grad_RO: Tensor, in_RI: Tensor, *, first: bool) -> None:
    """Add a product of bf16 to an fp32 buffer in one CUDA kernel; a first one overwrites.

    cuBLAS adds to and writes fp32, so no bf16 product is rounded, written and read. torch has these
    overloads on CUDA alone.
    """
    if not len(in_RI):
        if first:
            main_grad.zero_()
        return
    wide, left_OR = main_grad.dtype, out_grad_RO.t()
    if first:
        torch.ops.aten.mm.dtype_out(left_OR, in_RI, wide, out=main_grad)
    else:
        torch.ops.aten.addmm.dtype_out(main_grad, left_OR, in_RI, wide, out=main_grad)


def reset(self: Any) -> None:
    """Begin a step: zero what is added to, and only mark what a product will overwrite.

    In place of ``_ParamAndGradBuffer.reset``. Products are known from the step before.
    """
    for main_grad in (param.main_grad for param in self.param_index_map):
        if getattr(main_grad, "has_products", False):
            main_grad.stale = True
        else:
            main_grad.zero_()
    for extra in self.extra_main_grads:
        extra.zero_()


def zero_stale(params: Any) -> None:
    """Zero what no product came to, before anything reads it."""
    for param in params:
        if getattr(param.main_grad, "stale", False):
            param.main_grad.zero_()
            param.main_grad.stale = False


def wgrad_gemm_accum_fp32(in_RI: Tensor, out_grad_RO: Tensor, main_grad: Tensor) -> None:
    """What Megatron-Core's linear layers call of Apex's ``fused_weight_gradient_mlp_cuda``."""
    add_product(main_grad, out_grad_RO, in_RI)
