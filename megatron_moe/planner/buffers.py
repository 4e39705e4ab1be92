"""Megatron-Core's contiguous gradient and parameter buffers, element by element.

The rules of ``megatron/core/optimizer/param_layout.py`` and ``distrib_optimizer.py`` (0.19.2):
tensors in reverse module order, each start on a multiple of 64, each bucket's end on a multiple of
lcm(replicas, 128), and each bucket cut into equal shards, one a replica.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BufferLayout:
    """Where tensors lie in one buffer."""

    spans: tuple[tuple[int, int], ...]
    """First and one past the last element of each tensor, in the buffer's order."""
    buckets: tuple[tuple[int, int], ...]
    """The same of each bucket, padding included."""

    @property
    def elements(self) -> int:
        """Length of the buffer."""
        return self.buckets[-1][1] if self.buckets else 0

    def owned(self, replica: int, *, replicas: int) -> int:
        """Elements of tensors, not of padding, in one replica's shards."""
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
        replicas: Members of the group that gradients are reduced over.
        bucket_size: Elements after which a bucket ends; None makes one bucket, as Megatron-Core
            does without ``overlap_grad_reduce``, on all but the first stage and in all but the
            first chunk.
        alone: Which of them have a bucket of their own: an embedding that two stages share.
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
