"""Core attention on torch's SDPA, exact under context parallelism, without Transformer Engine.

Shape letters of this module:

    S  sequence (s: this cp rank's part)   B  batch   H  heads   G  KV groups   C  head width

Under context parallelism a sequence is cut into 2 * cp chunks and rank r holds chunks r and
2 * cp - 1 - r (zigzag), which gives every rank the same work under the causal mask. Keys and values
are gathered over cp and put back in order; queries stay where they are::

    cp = 2    chunks 0 1 2 3    rank 0 holds 0 3, rank 1 holds 1 2
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
        """Attend causally: ``(s, B, H, C)`` to ``(s, B, H * C)``."""
        cp = self.cp_group.size()
        mask_sS = None
        if cp > 1:
            key_sBGC = _gather_in_order(key_sBGC, self.cp_group)
            value_sBGC = _gather_in_order(value_sBGC, self.cp_group)
            mask_sS = _causal_mask(len(key_sBGC), cp, self.cp_group.rank())
        out_BHsC = F.scaled_dot_product_attention(
            query_sBHC.permute(1, 2, 0, 3),
            key_sBGC.permute(1, 2, 0, 3),
            value_sBGC.permute(1, 2, 0, 3),
            attn_mask=mask_sS,
            is_causal=mask_sS is None,
            scale=self.softmax_scale,
            enable_gqa=query_sBHC.shape[2] != key_sBGC.shape[2],
        )
        return out_BHsC.permute(2, 0, 1, 3).flatten(2)


def _gather_in_order(part_sBGC: Tensor, group: ProcessGroup) -> Tensor:
    """The whole sequence from every rank's two chunks; gradients go back to their ranks."""
    gathered = gather_from_sequence_parallel_region(part_sBGC.contiguous(), group=group)
    firsts, seconds = zip(*(p.chunk(2) for p in gathered.chunk(group.size())), strict=True)
    return torch.cat([*firsts, *reversed(seconds)])


@functools.lru_cache(maxsize=4)
def _causal_mask(length: int, cp: int, rank: int) -> Tensor:
    """Which of all keys each query of this rank may see: ``(s, S)``, True where it may."""
    chunks = torch.arange(length).chunk(2 * cp)
    position_s = torch.cat([chunks[rank], chunks[2 * cp - 1 - rank]])
    return torch.arange(length) <= position_s[:, None]
