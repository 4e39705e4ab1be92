"""Assign layers to pipeline ranks: equal blocks of consecutive layers, round-robin with vpp.

With vpp > 1, a rank holds vpp chunks, and chunk ``v`` of rank ``p`` is block ``v * pp + p`` of the
``pp * vpp`` blocks, as in Megatron-Core's interleaved schedule.
"""

from __future__ import annotations


def chunk_layers(*, num_layers: int, pp: int, vpp: int, pp_rank: int, vpp_rank: int = 0) -> range:
    """Return the global ids of the layers of one model chunk.

    >>> [chunk_layers(num_layers=8, pp=2, vpp=2, pp_rank=0, vpp_rank=v) for v in (0, 1)]
    [range(0, 2), range(4, 6)]
    """
    size = num_layers // (pp * vpp)
    first = (vpp_rank * pp + pp_rank) * size
    return range(first, first + size)


def is_first(*, pp_rank: int, vpp_rank: int = 0) -> bool:
    """Return whether the chunk holds the embedding."""
    return pp_rank == 0 and vpp_rank == 0


def is_last(*, pp: int, vpp: int, pp_rank: int, vpp_rank: int = 0) -> bool:
    """Return whether the chunk holds the final norm and the output layer."""
    return pp_rank == pp - 1 and vpp_rank == vpp - 1
