"""Attention masks as blocks of FlexAttention, for CUDA: no tensor of all queries by all keys.

Shape letters of this module:

    s  queries: this cp rank's tokens   S  keys: the whole sequence   B  batch
    q  blocks of queries                k  blocks of keys

Every query sees one run of keys: from the beginning of its document, or of the sequence, up to
itself. So the smallest and the largest begin and position of a block of queries decide which blocks
of keys it reads, and which of these need no mask inside.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_moe.parallel.sequence import zigzag

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""FlexAttention's question: may a query see a key? Of a sequence, a head, a query and a key."""

BLOCK = 128
"""Rows and columns of a block: what FlexAttention's kernels are tuned for."""


def positions(length: int, cp: int, rank: int, device: torch.device | None = None) -> Tensor:
    """Return the places in the sequence of a cp rank's tokens, ``(s,)``."""
    return zigzag(torch.arange(length, device=device), dim=0, cp_rank=rank, cp_size=cp)


@functools.lru_cache(maxsize=4)
def causal_blocks(length: int, cp: int, rank: int, device: torch.device) -> BlockMask:
    """Return the causal mask of a cp rank's queries and all keys, ``(1, 1, s, S)``."""
    position_s = positions(length, cp, rank, device)
    return _block_mask(
        torch.zeros_like(position_s)[None], position_s, causal(position_s), length=length
    )


def document_blocks(place_Bs: Tensor, *, length: int, cp: int, rank: int) -> BlockMask:
    """Return the mask that keeps attention within documents, ``(B, 1, s, S)``.

    All layers of a micro-batch pass the same tensor, and share the mask made for the first.

    Args:
        place_Bs: Place of each query in its document, from 0. It must not be changed in place.
        length: ``S``.
        cp: Context-parallel ranks.
        rank: This one.
    """
    return _document_blocks(_Memory(place_Bs), length, cp, rank)


class _Memory:
    """A tensor as a key: equal to another if both are the same memory.

    Recomputed layers see a detached copy of a tensor, which is another object. A key that is kept
    holds its tensor, so its memory cannot become another tensor's.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._key = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor._version

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Memory) and self._key == other._key


@functools.lru_cache(maxsize=16)  # micro-batches that a pipeline rank holds at a time
def _document_blocks(place: _Memory, length: int, cp: int, rank: int) -> BlockMask:
    place_Bs = place.tensor
    position_s = positions(length, cp, rank, place_Bs.device)
    begin_Bs = position_s - place_Bs
    return _block_mask(begin_Bs, position_s, within_documents(begin_Bs, position_s), length=length)


def _block_mask(
    begin_Bs: Tensor, position_s: Tensor, mask_mod: MaskMod, *, length: int
) -> BlockMask:
    from torch.nn.attention.flex_attention import BlockMask

    partial_Bqk, full_Bqk = block_kinds(begin_Bs, position_s, length=length)
    return BlockMask.from_kv_blocks(
        *_listed(partial_Bqk & ~full_Bqk),
        *_listed(full_Bqk),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(len(position_s), length),
    )


def causal(position_s: Tensor) -> MaskMod:
    """Return the mask by which each query of any sequence sees the keys up to its position."""

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, key: Tensor) -> Tensor:
        return key <= position_s[q]

    return mask_mod


def within_documents(begin_Bs: Tensor, position_s: Tensor) -> MaskMod:
    """Return the mask by which each query sees the keys from its begin up to its position."""

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, key: Tensor) -> Tensor:
        return (key >= begin_Bs[b, q]) & (key <= position_s[q])

    return mask_mod


def block_kinds(begin_Bs: Tensor, position_s: Tensor, *, length: int) -> tuple[Tensor, Tensor]:
    """Return which blocks hold anything to see, and of which every pair is seen: ``(B, q, k)``.

    The first may name a block too many where documents within a block of queries end and begin; the
    mask inside the block then hides all of it.
    """
    first_k = torch.arange(0, length, BLOCK, device=position_s.device)
    last_k = first_k + BLOCK - 1  # beyond the sequence in its last block, so that is never full
    begin_BqR, position_qR = _blocked(begin_Bs), _blocked(position_s[None])[0]
    least_Bq1, most_Bq1 = begin_BqR.amin(-1, keepdim=True), begin_BqR.amax(-1, keepdim=True)
    low_q1, high_q1 = position_qR.amin(-1, keepdim=True), position_qR.amax(-1, keepdim=True)
    some_Bqk = (first_k <= high_q1) & (last_k >= least_Bq1)
    full_Bqk = (last_k <= low_q1) & (first_k >= most_Bq1)
    return some_Bqk, full_Bqk


def _blocked(values_Bs: Tensor) -> Tensor:
    """Cut into blocks, ``(B, q, BLOCK)``; the last query fills up the last block."""
    length = values_Bs.shape[1]
    row = torch.arange(length + -length % BLOCK, device=values_Bs.device)
    return values_Bs[:, row.clamp(max=length - 1)].unflatten(1, (-1, BLOCK))


def _listed(chosen_Bqk: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of chosen blocks of each row, and all indices, chosen ones first."""
    order = chosen_Bqk.byte().argsort(dim=-1, descending=True, stable=True)
    return chosen_Bqk.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]


@functools.cache
def flex_attention() -> Callable[..., Any]:
    """Return torch's FlexAttention, compiled: without, it would make the whole mask and scores."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
