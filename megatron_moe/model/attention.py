"""Core attention with torch, exact under context parallelism, without Transformer Engine.

Whole causal sequences use SDPA. Under context parallelism and within documents, the CPU uses SDPA
with a dense mask, and CUDA uses FlexAttention's block mask, because SDPA has no fast CUDA kernel
for a mask with GQA.

Shape letters of this module:

    S  sequence (s: this cp rank's part)   B  batch   H  heads   G  KV groups   C  head dim

Under context parallelism a rank holds two chunks of the sequence, as assigned by
`parallel.sequence.zigzag`. Keys and values are gathered over cp and put back in order; queries stay
local.
"""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_moe.model.block_mask import (
    causal_blocks,
    document_blocks,
    flex_attention,
    positions,
)


class SdpaAttention(torch.nn.Module):
    """Causal attention for Megatron-Core's ``core_attention`` slot; it has no parameters."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        pg_collection: ProcessGroupCollection,
        softmax_scale: float | None = None,
        **unused_by_causal_self_attention: object,
    ) -> None:
        super().__init__()
        self.cp_group: ProcessGroup = pg_collection.cp
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query_sBHC: Tensor,
        key_sBGC: Tensor,
        value_sBGC: Tensor,
        attention_mask: Tensor | None,
        **unused_by_causal_self_attention: object,
    ) -> Tensor:
        """Attend causally: ``(s, B, H, C)`` to ``(s, B, H * C)``.

        ``attention_mask`` is the offset of each query in its document, ``(B, s)``; a query then
        attends to nothing before its document. With None it attends to all earlier tokens.
        """
        cp, rank = self.cp_group.size(), self.cp_group.rank()
        if cp > 1:
            key_sBGC = _gather_in_order(key_sBGC, self.cp_group)
            value_sBGC = _gather_in_order(value_sBGC, self.cp_group)
        qkv = [x.permute(1, 2, 0, 3) for x in (query_sBHC, key_sBGC, value_sBGC)]
        if query_sBHC.is_cuda and (cp > 1 or attention_mask is not None):
            blocks = _blocks(attention_mask, qkv[1], cp, rank)
            attend: Any = partial(flex_attention(), block_mask=blocks)
        else:
            mask = _mask(attention_mask, len(key_sBGC), cp, rank)
            attend = partial(F.scaled_dot_product_attention, attn_mask=mask, is_causal=mask is None)
        enable_gqa = query_sBHC.shape[2] != key_sBGC.shape[2]
        out_BHsC = attend(*qkv, scale=self.softmax_scale, enable_gqa=enable_gqa)
        return out_BHsC.permute(2, 0, 1, 3).flatten(2)


def _gather_in_order(part_sBGC: Tensor, group: ProcessGroup) -> Tensor:
    """Gather the whole sequence from every rank's two chunks; gradients return to their ranks."""
    gathered = gather_from_sequence_parallel_region(part_sBGC.contiguous(), group=group)
    firsts, seconds = zip(*(p.chunk(2) for p in gathered.chunk(group.size())), strict=True)
    return torch.cat([*firsts, *reversed(seconds)])


def _blocks(offset_Bs: Tensor | None, key_BGSC: Tensor, cp: int, rank: int) -> Any:
    """Return the block mask of this rank's queries, for CUDA."""
    length = key_BGSC.shape[2]
    if offset_Bs is None:
        return causal_blocks(length, cp, rank, key_BGSC.device)
    return document_blocks(offset_Bs, length=length, cp=cp, rank=rank)


def _mask(offset_Bs: Tensor | None, length: int, cp: int, rank: int) -> Tensor | None:
    """Return the dense mask of this rank's queries, or None for a whole causal sequence."""
    if offset_Bs is not None:
        return document_mask(offset_Bs, positions(length, cp, rank), length=length)
    return causal_mask(length, cp, rank) if cp > 1 else None


def document_mask(offset_Bs: Tensor, position_s: Tensor, *, length: int) -> Tensor:
    """Return which keys each query may see: those of its document up to itself, ``(B, 1, s, S)``.

    The document of a query begins at its position minus its offset in the document, so cp ranks
    need no data from each other.

    Args:
        offset_Bs: Offset of each query in its document, from 0.
        position_s: Position of each query in the sequence.
        length: ``S``.
    """
    key_S = torch.arange(length, device=offset_Bs.device)
    begin_Bs1 = (position_s - offset_Bs)[..., None]
    return ((key_S >= begin_Bs1) & (key_S <= position_s[:, None]))[:, None]


@functools.lru_cache(maxsize=4)
def causal_mask(length: int, cp: int, rank: int) -> Tensor:
    """Return which keys each query of this rank may see, ``(s, S)``."""
    return torch.arange(length) <= positions(length, cp, rank)[:, None]
