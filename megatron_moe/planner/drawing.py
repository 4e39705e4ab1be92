"""How a layout's groups lie on nodes, in text."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe.parallel.layout import fold
from megatron_moe.planner.network import AXES, group_of
from megatron_moe.planner.workload import Degrees

SHOWN_NODES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Where the groups of one axis lie."""

    axis: str
    size: int
    stride: int
    nodes: int
    """Nodes that one group touches."""

    @property
    def link(self) -> str:
        """What its members talk over."""
        if self.size == 1:
            return "-"
        return "NVLink" if self.nodes == 1 else "network"


def spans(degrees: Degrees, *, gpus_per_node: int = 8) -> list[Span]:
    """Every axis with its group size, the distance of neighbours in ranks, and nodes touched."""
    return [
        Span(
            axis=axis,
            size=group.size,
            stride=group.stride,
            nodes=-(-group.size // group.per_node(gpus_per_node)),
        )
        for axis in AXES
        for group in [group_of(axis, degrees)]
    ]


def draw(degrees: Degrees, *, gpus_per_node: int = 8) -> str:
    """Coordinates of the first nodes' GPUs on both grids.

    >>> print(draw(Degrees(gpus=4, tp=2, ep=4), gpus_per_node=4))
    node 0  gpu  0  1  2  3
     attn   tp   0  1  0  1
            cp   0  0  0  0
            dp   0  0  1  1
     expert etp  0  0  0  0
            ep   0  1  2  3
            edp  0  0  0  0
            pp   0  0  0  0
    """
    layout = fold(degrees.parallel(), world_size=degrees.gpus)
    nodes = -(-degrees.gpus // gpus_per_node)
    blocks = []
    for node in range(min(nodes, SHOWN_NODES)):
        ranks = range(node * gpus_per_node, min((node + 1) * gpus_per_node, degrees.gpus))
        attention = [layout.attention.coords(rank) for rank in ranks]
        experts = [layout.experts.coords(rank) for rank in ranks]
        rows = [_row(f"node {node}", "gpu", list(ranks))]
        rows += [
            _row(" attn" * (axis == "tp"), axis, [c[axis] for c in attention])
            for axis in ("tp", "cp", "dp")
        ]
        rows += [
            _row(" expert" * (axis == "etp"), axis, [c[axis] for c in experts])
            for axis in ("etp", "ep", "edp", "pp")
        ]
        blocks.append("\n".join(rows))
    if nodes > SHOWN_NODES:
        per_stage = degrees.gpus / degrees.pp / gpus_per_node
        blocks.append(f"... {nodes} nodes, {per_stage:g} to a pipeline stage")
    return "\n\n".join(blocks)


def _row(title: str, axis: str, values: list[int]) -> str:
    return f"{title:7} {axis:3} " + " ".join(f"{value:>2}" for value in values)
