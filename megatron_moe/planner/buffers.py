"""Compute the layout of Megatron-Core's contiguous gradient and parameter buffers.

It follows ``megatron/core/optimizer/param_layout.py`` and ``distrib_optimizer.py`` (0.19.2):
tensors are in reverse module order, each starts at a multiple of 64, each bucket ends at a multiple
of lcm(replicas, 128), and each bucket is divided into equal shards, one per replica.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BufferLayout:
    """Positions of tensors and buckets in one buffer."""

    spans: tuple[tuple[int, int], ...]
    """Start and end (exclusive) of each tensor, in the buffer's order."""
    buckets: tuple[tuple[int, int], ...]
    """Start and end (exclusive) of each bucket, padding included."""

    @property
    def elements(self) -> int:
        """Length of the buffer in elements."""
        return self.buckets[-1][1] if self.buckets else 0

    def owned(self, replica: int, *, replicas: int) -> int:
        """Return the number of elements in one replica's shards, without padding."""
        owned = 0
        for start, end in self.buckets:
            shard = (end - start) // replicas
            first = start + replica * shard
            owned += sum(
                max(0, min(stop, first + shard) - max(begin, first)) for begin, stop in self.spans
            )
        return owned


def distributed_layout(
    sizes: list[int],
    *,
    replicas: int,
    bucket_size: int | None = None,
    alone: frozenset[int] = frozenset(),
) -> BufferLayout:
    """Lay tensors out for the distributed optimizer.

    Args:
        sizes: Elements of each tensor, in module order.
        replicas: Size of the group that gradients are reduced over.
        bucket_size: Elements after which a bucket ends; None makes one bucket, as Megatron-Core
            does without ``overlap_grad_reduce``, on all but the first stage and in all but the
            first chunk.
        alone: Indices of tensors with a bucket of their own: an embedding shared by two stages.
    """
    unit = math.lcm(replicas, 128)
    spans: list[tuple[int, int]] = []
    buckets: list[tuple[int, int]] = []
    bucket_start = end = 0
    for index in reversed(range(len(sizes))):
        if index in alone and end > bucket_start:
            end = _round_up(end, unit)
            buckets.append((bucket_start, end))
            bucket_start = end
        start = _round_up(end, 64)
        end = start + sizes[index]
        spans.append((start, end))
        full = bucket_size is not None and end - bucket_start >= bucket_size
        if full or index in alone:
            end = _round_up(end, unit)
            buckets.append((bucket_start, end))
            bucket_start = end
    if end > bucket_start:
        buckets.append((bucket_start, _round_up(end, unit)))
    return BufferLayout(tuple(spans), tuple(buckets))


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
