"""Compute with few passes what Megatron-Core 0.19 computes with many without Transformer Engine.

The results are the same. This module is imported after Megatron-Core; `install_torch_engine`
replaces Megatron-Core's functions by these.

Shape letters: S sequence, B micro-batch, H heads, C head dimension, c half of it.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer.moe.moe_utils import sort_chunks_by_idxs
from torch import Tensor

from megatron_moe.runtime.compiled import compiled_on_cuda

_megatron_rotate = rope_utils._apply_rotary_pos_emb_bshd


def sort_chunks(
    input: Tensor,
    split_sizes: Tensor,
    sorted_idxs: Tensor,
    probs: Tensor | None = None,
    fused: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Sort chunks of tokens by expert; return them without a copy if they are sorted already."""
    if sorted_idxs.tolist() == list(range(len(sorted_idxs))):
        return input, probs
    return sort_chunks_by_idxs(input, split_sizes, sorted_idxs, probs, fused)


def rotate(
    t: Tensor,
    freqs: Tensor,
    rotary_interleaved: bool = False,
    mla_rotary_interleaved: bool = False,
    mscale: float = 1.0,
    **deprecated: Any,
) -> Tensor:
    """Apply rotary embedding to whole heads, ``(S, B, H, C)``, in three passes; save only angles.

    Variants that no Llama model uses call Megatron-Core: interleaved halves, partial rotation.
    """
    interleaved = rotary_interleaved or mla_rotary_interleaved
    if interleaved or mscale != 1.0 or deprecated or freqs.shape[-1] != t.shape[-1]:
        return _megatron_rotate(
            t, freqs, rotary_interleaved, mla_rotary_interleaved, mscale, **deprecated
        )
    return _Rotation.apply(t, *_cos_and_sin(freqs, t.dtype))


def _cos_and_sin(freqs: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the angles, cached on ``freqs``, because all layers share them."""
    cached = getattr(freqs, "cos_and_sin", None)
    if cached is None or cached[0].dtype != dtype:
        cached = freqs.cos().to(dtype), freqs.sin().to(dtype)
        setattr(freqs, "cos_and_sin", cached)  # noqa: B010 - Tensor has no such attribute
    return cached


class _Rotation(torch.autograd.Function):
    """Rotation by the angles; its backward pass rotates by the negative angles."""

    @staticmethod
    def forward(ctx: Any, t_SBHC: Tensor, cos_S11C: Tensor, sin_S11C: Tensor) -> Tensor:
        ctx.save_for_backward(cos_S11C, sin_S11C)
        return _rotated(t_SBHC, cos_S11C, sin_S11C)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        cos_S11C, sin_S11C = ctx.saved_tensors
        return _rotated(grads[0], cos_S11C, -sin_S11C), None, None


@compiled_on_cuda
def _rotated(t_SBHC: Tensor, cos_S11C: Tensor, sin_S11C: Tensor) -> Tensor:
    first_SBHc, second_SBHc = t_SBHC.chunk(2, dim=-1)
    sin_S11c = sin_S11C.chunk(2, dim=-1)[0]  # both halves have the same angles
    out_SBHC = t_SBHC * cos_S11C
    out_first_SBHc, out_second_SBHc = out_SBHC.chunk(2, dim=-1)
    out_first_SBHc.addcmul_(second_SBHc, sin_S11c, value=-1)
    out_second_SBHc.addcmul_(first_SBHc, sin_S11c)
    return out_SBHC


_ROW = 4096


def l2_norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], *_: object
) -> tuple[Tensor, None]:
    """Return the joint norm of all tensors, like Apex's ``multi_tensor_l2norm``.

    On CUDA one kernel handles many tensors; Megatron-Core's own function waits for the GPU at each
    tensor. On a CPU the norm is computed by rows, because torch uses one thread for a long vector.
    """
    if tensor_lists[0] and tensor_lists[0][0].is_cuda:
        return norm_of_norms(tensor_lists[0]), None
    squares = [_square(tensor.detach().flatten()) for tensor in tensor_lists[0]]
    return torch.stack(squares).sum().sqrt().float().view(1), None


def norm_of_norms(tensors: list[Tensor]) -> Tensor:
    """Return the joint fp32 norm of all tensors, ``(1,)``."""
    norms = torch._foreach_norm([tensor.detach() for tensor in tensors], dtype=torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms)).view(1)


def _square(values: Tensor) -> Tensor:
    whole = len(values) - len(values) % _ROW
    rows, rest = values[:whole].view(-1, _ROW), values[whole:]
    norms = torch.linalg.vector_norm(rows, dim=1).double()
    return norms.square().sum() + torch.linalg.vector_norm(rest).double().square()
