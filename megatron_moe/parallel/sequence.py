"""Slice sequences over context-parallel ranks.

A sequence is divided into 2 * cp chunks, and rank r holds chunks r and 2 * cp - 1 - r (zigzag): an
early chunk, which is cheap under the causal mask, and a late one, which is expensive.
Megatron-Core's attention expects this order (see its ``utils.get_batch_on_this_cp_rank``)::

    cp = 2    chunks 0 1 2 3    rank 0 holds 0 3, rank 1 holds 1 2
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


def zigzag(x: Tensor, *, dim: int, cp_rank: int, cp_size: int) -> Tensor:
    """Return the rank's slice of ``x`` along ``dim``, whose length ``2 * cp_size`` must divide."""
    if cp_size == 1:
        return x
    chunks = x.chunk(2 * cp_size, dim=dim)
    return torch.cat((chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]), dim=dim)


def positions_of_rank(length: int, *, tp: ProcessGroup, cp: ProcessGroup) -> Tensor:
    """Return the positions in the whole sequence of a rank's ``length`` positions.

    With sequence parallelism, tp ranks split what a cp rank holds into consecutive parts.
    """
    whole_S = torch.arange(length * tp.size() * cp.size())
    cp_part = zigzag(whole_S, dim=0, cp_rank=cp.rank(), cp_size=cp.size())
    return cp_part.chunk(tp.size())[tp.rank()]
