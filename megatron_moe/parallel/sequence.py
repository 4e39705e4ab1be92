"""Slice sequences over context-parallel ranks.

A sequence is divided into 2 * cp chunks, and rank r holds chunks r and 2 * cp - 1 - r (zigzag): an
early chunk, which is cheap under the causal mask, and a late one, which is expensive.
Megatron-Core's attention expects this order (see its ``utils.get_batch_on_this_cp_rank``)::

    cp = 2    chunks 0 1 2 3    rank 0 holds 0 3, rank 1 holds 1 2
"""

from __future__ import annotations

import torch
from torch import Tensor


def zigzag(x: Tensor, *, dim: int, cp_rank: int, cp_size: int) -> Tensor:
    """Return the rank's slice of ``x`` along ``dim``, whose length ``2 * cp_size`` must divide."""
    if cp_size == 1:
        return x
    chunks = x.chunk(2 * cp_size, dim=dim)
    return torch.cat((chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]), dim=dim)
