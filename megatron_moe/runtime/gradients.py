"""Accumulate weight gradients into data parallelism's fp32 buffers within the matrix products.

Apex has a CUDA kernel for this; the last function here replaces it under the same name. Unlike
Apex, the first product of a step overwrites its buffer, so the buffer is neither zeroed nor read,
which saves two passes over the bytes of all gradients.

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
    """Mark a buffer as written by products; return whether the next product must overwrite it."""
    first = getattr(main_grad, "stale", False)
    setattr(main_grad, "stale", False)  # noqa: B010 - Tensor has no such attribute
    setattr(main_grad, "has_products", True)  # noqa: B010
    return first


def add_widened(main_grad: Tensor, out_grad_RO: Tensor, in_RI: Tensor, *, first: bool) -> None:
    """Add a product of bf16 matrices to an fp32 buffer in one CUDA kernel; overwrite if ``first``.

    cuBLAS accumulates and writes fp32, so no product is rounded to bf16, written and read again.
    torch has these overloads only on CUDA.
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
    """Begin a step: zero buffers that are added to, but only mark those that products overwrite.

    This replaces ``_ParamAndGradBuffer.reset``. The buffers that products write to are known from
    the previous step.
    """
    for main_grad in (param.main_grad for param in self.param_index_map):
        if getattr(main_grad, "has_products", False):
            main_grad.stale = True
        else:
            main_grad.zero_()
    for extra in self.extra_main_grads:
        extra.zero_()


def zero_stale(params: Any) -> None:
    """Zero buffers that no product has overwritten, before anything reads them."""
    for param in params:
        if getattr(param.main_grad, "stale", False):
            param.main_grad.zero_()
            param.main_grad.stale = False


def wgrad_gemm_accum_fp32(in_RI: Tensor, out_grad_RO: Tensor, main_grad: Tensor) -> None:
    """Replace the function of ``fused_weight_gradient_mlp_cuda`` that Megatron-Core calls."""
    add_product(main_grad, out_grad_RO, in_RI)


wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32
"""Function that Megatron-Core calls for buffers in the dtype of the weights."""
