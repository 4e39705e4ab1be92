"""Core attention on torch's SDPA, exact under context parallelism, without Transformer Engine.

Shape letters of this module:

    S  sequence (s: this cp rank's part)   B  batch   H  heads   G  KV groups   C  head width

Under context parallelism a rank holds the two runs of the sequence that `parallel.sequence.zigzag`
gives it. Keys and values are gathered over cp and put back in order; queries stay where they are.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_moe.parallel.sequence import zigzag


class SdpaAttention(torch.nn.Module):
    """Causal attention of Megatron-Core's ``core_attention`` slot; it has no parameters."""

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

        ``attention_mask`` is the place of each query in its document, ``(B, s)``: it then attends
        to nothing before the document. None lets it attend to the whole sequence before it.
        """
        cp, rank = self.cp_group.size(), self.cp_group.rank()
        mask = None
        if cp > 1:
            key_sBGC = _gather_in_order(key_sBGC, self.cp_group)
            value_sBGC = _gather_in_order(value_sBGC, self.cp_group)
            mask = _causal_mask(len(key_sBGC), cp, rank)
        if attention_mask is not None:
            length = len(key_sBGC)
            position_s = _positions(length, cp, rank).to(attention_mask.device)
            mask = document_mask(attention_mask, position_s, length=length)
        out_BHsC = F.scaled_dot_product_attention(
            query_sBHC.permute(1, 2, 0, 3),
            key_sBGC.permute(1, 2, 0, 3),
            value_sBGC.permute(1, 2, 0, 3),
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=query_sBHC.shape[2] != key_sBGC.shape[2],
        )
        return out_BHsC.permute(2, 0, 1, 3).flatten(2)


def _gather_in_order(part_sBGC: Tensor, group: ProcessGroup) -> Tensor:
    """The whole sequence from every rank's two chunks; gradients go back to their ranks."""
    gathered = gather_from_sequence_parallel_region(part_sBGC.contiguous(), group=group)
    firsts, seconds = zip(*(p.chunk(2) for p in gathered.chunk(group.size())), strict=True)
    return torch.cat([*firsts, *reversed(seconds)])


def document_mask(place_Bs: Tensor, position_s: Tensor, *, length: int) -> Tensor:
    """Which of all keys each query may see: its document's up to itself, ``(B, 1, s, S)``.

    A query knows where its document begins: at its own position less its place in the document.
    So cp ranks need nothing of each other.

    Args:
        place_Bs: Place of each query in its document, from 0.
        position_s: Place of each query in the sequence.
        length: ``S``.
    """
    key_S = torch.arange(length, device=place_Bs.device)
    begin_Bs1 = (position_s - place_Bs)[..., None]
    return ((key_S >= begin_Bs1) & (key_S <= position_s[:, None]))[:, None]


def _positions(length: int, cp: int, rank: int) -> Tensor:
    """Places in the sequence of this rank's tokens, ``(s,)``."""
    return zigzag(torch.arange(length), dim=0, cp_rank=rank, cp_size=cp)


@functools.lru_cache(maxsize=4)
def _causal_mask(length: int, cp: int, rank: int) -> Tensor:
    """Which of all keys each query of this rank may see: ``(s, S)``, True where it may."""
    return torch.arange(length) <= _positions(length, cp, rank)[:, None]
