"""What Megatron-Core 0.19 does the long way round on a CPU, done the short way: same results.

Imported once Megatron-Core is; `cpu.install` puts these in its place.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.moe_utils import sort_chunks_by_idxs
from torch import Tensor


def scale_in_place(
    chunk_size: int, overflow: Tensor, lists: tuple[list[Tensor], list[Tensor]], scale: float
) -> None:
    """Clipping's product; Megatron-Core's own goes through a second copy of all gradients."""
    gradients, scaled = lists
    assert all(a is b for a, b in zip(gradients, scaled, strict=True))
    torch._foreach_mul_(gradients, scale)


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
