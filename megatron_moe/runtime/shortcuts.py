"""What Megatron-Core 0.19 does in many passes without Transformer Engine, in few: same results.

Imported once Megatron-Core is; `install_torch_engine` puts these in its place.

Shape letters: S sequence, B micro-batch, H heads, C head width, c half of it.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer.moe.moe_utils import sort_chunks_by_idxs
from torch import Tensor

from megatron_moe.runtime.compiled import compiled_on_cuda

_rotate_any_way = rope_utils._apply_rotary_pos_emb_bshd


def sort_chunks(
    input: Tensor,
    split_sizes: Tensor,
    sorted_idxs: Tensor,
    probs: Tensor | None = None,
    fused: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Chunks of tokens by expert; where one rank sends, they are in order and nothing is copied."""
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
    """Rotary embedding of whole heads, ``(S, B, H, C)``; three passes, and only angles kept.

    What no Llama asks for goes Megatron-Core's way: interleaved halves, a part of the head.
    """
    interleaved = rotary_interleaved or mla_rotary_interleaved
    if interleaved or mscale != 1.0 or deprecated or freqs.shape[-1] != t.shape[-1]:
        return _rotate_any_way(
            t, freqs, rotary_interleaved, mla_rotary_interleaved, mscale, **deprecated
        )
    return _Rotation.apply(t, *_cos_and_sin(freqs, t.dtype))


def _cos_and_sin(freqs: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both of the angles, kept with them: all layers turn queries and keys by the same."""
    kept = getattr(freqs, "cos_and_sin", None)
    if kept is None or kept[0].dtype != dtype:
        kept = freqs.cos().to(dtype), freqs.sin().to(dtype)
        setattr(freqs, "cos_and_sin", kept)  # noqa: B010 - Tensor has no such attribute
    return kept


class _Rotation(torch.autograd.Function):
    """A rotation by the angles; its gradient is one by as much the other way."""

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
    sin_S11c = sin_S11C.chunk(2, dim=-1)[0]  # both halves turn by the same angles
    out_SBHC = t_SBHC * cos_S11C
    out_first_SBHc, out_second_SBHc = out_SBHC.chunk(2, dim=-1)
    out_first_SBHc.addcmul_(second_SBHc, sin_S11c, value=-1)
    out_second_SBHc.addcmul_(first_SBHc, sin_S11c)
    return out_SBHC


_ROW = 4096


def l2_norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], *_: object
) -> tuple[Tensor, None]:
    """Norm of all tensors together, as Apex's ``multi_tensor_l2norm``.

    On CUDA one kernel takes many tensors; Megatron-Core's own function waits for the GPU at each.
    On a CPU by rows, because torch takes the norm of a long vector on one thread.
    """
    if tensor_lists[0] and tensor_lists[0][0].is_cuda:
        return norm_of_norms(tensor_lists[0]), None
    squares = [_square(tensor.detach().flatten()) for tensor in tensor_lists[0]]
    return torch.stack(squares).sum().sqrt().float().view(1), None


def norm_of_norms(tensors: list[Tensor]) -> Tensor:
    """Return the fp32 norm of all tensors together, ``(1,)``."""
    norms = torch._foreach_norm([tensor.detach() for tensor in tensors], dtype=torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms)).view(1)


def _square(values: Tensor) -> Tensor:
    whole = len(values) - len(values) % _ROW
    rows, rest = values[:whole].view(-1, _ROW), values[whole:]
    norms = torch.linalg.vector_norm(rows, dim=1).double()
    return norms.square().sum() + torch.linalg.vector_norm(rest).double().square()
