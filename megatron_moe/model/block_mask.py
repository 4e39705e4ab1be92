"""Build attention masks as FlexAttention blocks, for CUDA, without a queries-by-keys tensor.

Shape letters of this module:

    s  queries: this cp rank's tokens   S  keys: the whole sequence   B  batch
    q  blocks of queries                k  blocks of keys

Every query sees one run of keys: from the beginning of its document, or of the sequence, up to
itself. So the minimum and maximum begin and position of a block of queries determine which blocks
of keys it reads, and which of these need no mask inside the block.
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
"""Function of sequence, head, query and key indices that returns whether the query sees the key."""

BLOCK = 128
"""Rows and columns of a block; FlexAttention's kernels are tuned for this size."""


def positions(length: int, cp: int, rank: int, device: torch.device | None = None) -> Tensor:
    """Return the positions of a cp rank's tokens in the sequence, ``(s,)``."""
    return zigzag(torch.arange(length, device=device), dim=0, cp_rank=rank, cp_size=cp)


@functools.lru_cache(maxsize=4)
def causal_blocks(length: int, cp: int, rank: int, device: torch.device) -> BlockMask:
    """Return the causal mask of a cp rank's queries over all keys, ``(1, 1, s, S)``."""
    position_s = positions(length, cp, rank, device)
    return _block_mask(
        torch.zeros_like(position_s)[None], position_s, causal(position_s), length=length
    )


def document_blocks(offset_Bs: Tensor, *, length: int, cp: int, rank: int) -> BlockMask:
    """Return the mask that keeps attention within documents, ``(B, 1, s, S)``.

    All layers of a micro-batch pass the same tensor and share the mask built for the first layer.

    Args:
        offset_Bs: Offset of each query in its document, from 0. It must not be changed in place.
        length: ``S``.
        cp: Number of context-parallel ranks.
        rank: This cp rank.
    """
    return _document_blocks(_TensorKey(offset_Bs), length, cp, rank)


class _TensorKey:
    """A tensor as a cache key; two keys are equal if their tensors share the same memory.

    Recomputed layers get a detached copy of a tensor, which is a different object. A cached key
    keeps its tensor alive, so its memory cannot be reused by another tensor.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._key = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor._version

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _TensorKey) and self._key == other._key


@functools.lru_cache(maxsize=16)  # micro-batches that a pipeline rank holds at once
def _document_blocks(offset: _TensorKey, length: int, cp: int, rank: int) -> BlockMask:
    offset_Bs = offset.tensor
    position_s = positions(length, cp, rank, offset_Bs.device)
    begin_Bs = position_s - offset_Bs
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
    """Return the mask function that lets each query see the keys up to its position."""

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, key: Tensor) -> Tensor:
        return key <= position_s[q]

    return mask_mod


def within_documents(begin_Bs: Tensor, position_s: Tensor) -> MaskMod:
    """Return the mask function that lets each query see keys from its begin to its position."""

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, key: Tensor) -> Tensor:
        return (key >= begin_Bs[b, q]) & (key <= position_s[q])

    return mask_mod


def block_kinds(begin_Bs: Tensor, position_s: Tensor, *, length: int) -> tuple[Tensor, Tensor]:
    """Return which blocks are not empty, and which are completely visible: both ``(B, q, k)``.

    The first result may include an empty block if a document ends within a block of queries; the
    mask inside the block then hides all of it.
    """
    first_k = torch.arange(0, length, BLOCK, device=position_s.device)
    last_k = first_k + BLOCK - 1  # may exceed the sequence, so a partial last block is never full
    begin_BqR, position_qR = _blocked(begin_Bs), _blocked(position_s[None])[0]
    least_Bq1, most_Bq1 = begin_BqR.amin(-1, keepdim=True), begin_BqR.amax(-1, keepdim=True)
    low_q1, high_q1 = position_qR.amin(-1, keepdim=True), position_qR.amax(-1, keepdim=True)
    some_Bqk = (first_k <= high_q1) & (last_k >= least_Bq1)
    full_Bqk = (last_k <= low_q1) & (first_k >= most_Bq1)
    return some_Bqk, full_Bqk


def _blocked(values_Bs: Tensor) -> Tensor:
    """Split into blocks, ``(B, q, BLOCK)``; the last query pads the last block."""
    length = values_Bs.shape[1]
    row = torch.arange(length + -length % BLOCK, device=values_Bs.device)
    return values_Bs[:, row.clamp(max=length - 1)].unflatten(1, (-1, BLOCK))


def _listed(chosen_Bqk: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's number of chosen blocks, and all block indices, chosen ones first."""
    order = chosen_Bqk.byte().argsort(dim=-1, descending=True, stable=True)
    return chosen_Bqk.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]


@functools.cache
def flex_attention() -> Callable[..., Any]:
    """Return compiled FlexAttention; uncompiled, it would build the whole mask and score matrix."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
