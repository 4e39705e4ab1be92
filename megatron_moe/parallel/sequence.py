"""Which positions of a sequence a context-parallel rank holds.

A sequence is cut into 2 * cp runs and rank r holds runs r and 2 * cp - 1 - r (zigzag): an early
one, cheap under the causal mask, and a late one, dear. Megatron-Core's attention expects exactly
this (its ``utils.get_batch_on_this_cp_rank``)::

    cp = 2    runs 0 1 2 3    rank 0 holds 0 3, rank 1 holds 1 2
"""

from __future__ import annotations

import torch
from torch import Tensor


def zigzag(x: Tensor, *, dim: int, cp_rank: int, cp_size: int) -> Tensor:
    """The rank's part of ``x`` along ``dim``, whose length ``2 * cp_size`` divides."""
    if cp_size == 1:
        return x
    runs = x.chunk(2 * cp_size, dim=dim)
    return torch.cat((runs[cp_rank], runs[2 * cp_size - 1 - cp_rank]), dim=dim)
