"""Show as text how a layout's groups are placed on nodes."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe.parallel.layout import fold
from megatron_moe.planner.network import AXES, group_of
from megatron_moe.planner.workload import Degrees

MAX_SHOWN_NODES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Placement of the groups of one axis."""

    axis: str
    size: int
    stride: int
    nodes: int
    """Number of nodes that one group spans."""

    @property
    def link(self) -> str:
        """The kind of link between members of the group."""
        if self.size == 1:
            return "-"
        return "NVLink" if self.nodes == 1 else "network"


def spans(degrees: Degrees, *, gpus_per_node: int = 8) -> list[Span]:
    """Return the group size, stride in ranks and number of nodes of each axis."""
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
    """Return the coordinates of the first nodes' GPUs in both grids.

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
    for node in range(min(nodes, MAX_SHOWN_NODES)):
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
    if nodes > MAX_SHOWN_NODES:
        per_stage = degrees.gpus / degrees.pp / gpus_per_node
        blocks.append(f"... {nodes} nodes, {per_stage:g} to a pipeline stage")
    return "\n\n".join(blocks)


def _row(title: str, axis: str, values: list[int]) -> str:
    return f"{title:7} {axis:3} " + " ".join(f"{value:>2}" for value in values)
