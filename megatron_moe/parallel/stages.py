"""Assign layers to pipeline ranks: blocks of consecutive layers, round-robin with vpp.

Stages are equally large, except that the first and the last may hold another number of layers.
With vpp > 1, a rank holds vpp chunks, and chunk ``v`` of rank ``p`` is block ``v * pp + p`` of the
``pp * vpp`` blocks, as in Megatron-Core's interleaved schedule.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """Layers of the first and of the last stage; None gives a stage as many as any other."""

    first: int | None = None
    last: int | None = None


EVEN = Ends()


def stage_sizes(num_layers: int, pp: int, ends: Ends = EVEN) -> list[int] | None:
    """Return the number of layers of each stage, or None if they cannot be distributed so.

    >>> stage_sizes(30, 4, Ends(first=7, last=7)), stage_sizes(30, 4)
    ([7, 8, 8, 7], None)
    """
    given = [size for size in (ends.first, ends.last) if size is not None]
    others, left = pp - len(given), num_layers - sum(given)
    if others < 0 or (others == 0 and left) or (others and (left < others or left % others)):
        return None
    share = left // others if others else 0
    sizes = [share] * pp
    sizes[0] = sizes[0] if ends.first is None else ends.first
    sizes[-1] = sizes[-1] if ends.last is None else ends.last
    return sizes


def chunk_layers(
    *, num_layers: int, pp: int, vpp: int, pp_rank: int, vpp_rank: int = 0, ends: Ends = EVEN
) -> range:
    """Return the global ids of the layers of one model chunk.

    >>> [chunk_layers(num_layers=8, pp=2, vpp=2, pp_rank=0, vpp_rank=v) for v in (0, 1)]
    [range(0, 2), range(4, 6)]
    """
    sizes = stage_sizes(num_layers, pp, ends)
    assert sizes is not None, "the rules refuse other layouts"
    first = (vpp_rank * num_layers + sum(sizes[:pp_rank])) // vpp
    return range(first, first + sizes[pp_rank] // vpp)


def is_first(*, pp_rank: int, vpp_rank: int = 0) -> bool:
    """Return whether the chunk holds the embedding."""
    return pp_rank == 0 and vpp_rank == 0


def is_last(*, pp: int, vpp: int, pp_rank: int, vpp_rank: int = 0) -> bool:
    """Return whether the chunk holds the final norm and the output layer."""
    return pp_rank == pp - 1 and vpp_rank == vpp - 1
