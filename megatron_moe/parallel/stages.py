"""Assign layers to pipeline ranks: blocks of consecutive layers, round-robin with vpp.

Stages are equally large, except that the first and the last may hold another number of layers, or
a layout string gives the number of each block. With vpp > 1, a rank holds vpp chunks, and chunk
``v`` of rank ``p`` is block ``v * pp + p`` of the ``pp * vpp`` blocks, as in Megatron-Core's
interleaved schedule.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineSplit:
    """Division of layers into pipeline stages."""

    first: int | None = None
    """Layers of the first stage; None: as many as any other."""
    last: int | None = None
    """Layers of the last stage; None: as many as any other."""
    layout: str | None = None
    """Contents of each block, as in ``parallel.pipeline_model_parallel_layout``."""


EVEN = PipelineSplit()
MAX_REPEATED = 1000
"""Upper bound for a number in a layout string, more than any model has layers."""


def layout_blocks(layout: str) -> list[str]:
    """Return the blocks of a layout string in Megatron-Core's notation.

    Raises:
        ValueError: It repeats something more than `MAX_REPEATED` times.

    >>> layout_blocks("Et|(tt|)*2,t*3L")
    ['Et', 'tt', 'tt', 'tttL']
    """
    text = layout.replace(",", "")
    for repeated in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        text = re.sub(repeated, _repeat, text)
    return text.split("|")


def _layers_of_blocks(layout: str) -> list[int]:
    return [block.count("t") for block in layout_blocks(layout)]


def _repeat(match: re.Match[str]) -> str:
    if len(match[2]) > len(str(MAX_REPEATED)) or int(match[2]) > MAX_REPEATED:
        raise ValueError(f"a layout may repeat a part {MAX_REPEATED} times, not {match[2]} times")
    return match[1] * int(match[2])


def stage_sizes(num_layers: int, pp: int, split: PipelineSplit = EVEN) -> list[int] | None:
    """Return the number of layers of each stage, or None if they cannot be distributed so.

    >>> stage_sizes(30, 4, PipelineSplit(first=7, last=7)), stage_sizes(30, 4)
    ([7, 8, 8, 7], None)
    >>> stage_sizes(6, 2, PipelineSplit(layout="Et|tt|t|ttL"))
    [2, 4]
    """
    if split.layout is not None:
        blocks = _layers_of_blocks(split.layout)
        return None if sum(blocks) != num_layers else [sum(blocks[p::pp]) for p in range(pp)]
    given = [size for size in (split.first, split.last) if size is not None]
    others, left = pp - len(given), num_layers - sum(given)
    if others < 0 or (others == 0 and left) or (others and (left < others or left % others)):
        return None
    share = left // others if others else 0
    sizes = [share] * pp
    sizes[0] = sizes[0] if split.first is None else split.first
    sizes[-1] = sizes[-1] if split.last is None else split.last
    return sizes


def chunk_layers(
    *,
    num_layers: int,
    pp: int,
    vpp: int,
    pp_rank: int,
    vpp_rank: int = 0,
    split: PipelineSplit = EVEN,
) -> range:
    """Return the global ids of the layers of one model chunk.

    >>> [chunk_layers(num_layers=8, pp=2, vpp=2, pp_rank=0, vpp_rank=v) for v in (0, 1)]
    [range(0, 2), range(4, 6)]
    """
    if split.layout is not None:
        blocks = _layers_of_blocks(split.layout)
        index = vpp_rank * pp + pp_rank
        return range(sum(blocks[:index]), sum(blocks[: index + 1]))
    sizes = stage_sizes(num_layers, pp, split)
    assert sizes is not None, "the rules refuse other layouts"
    first = (vpp_rank * num_layers + sum(sizes[:pp_rank])) // vpp
    return range(first, first + sizes[pp_rank] // vpp)


def is_first(*, pp_rank: int, vpp_rank: int = 0) -> bool:
    """Return whether the chunk holds the embedding."""
    return pp_rank == 0 and vpp_rank == 0


def is_last(*, pp: int, vpp: int, pp_rank: int, vpp_rank: int = 0) -> bool:
    """Return whether the chunk holds the final norm and the output layer."""
    return pp_rank == pp - 1 and vpp_rank == vpp - 1
