"""Placement of a group's ranks on nodes, and the time of a collective over them.

The tp (etp) coordinate varies fastest with the rank, so a group is an arithmetic progression of
ranks whose stride is the product of the faster axes. Its stride and size determine which members
share a node.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe.planner.hardware import Gpu
from megatron_moe.planner.workload import Degrees

LATENCY_SECONDS = 15e-6
"""Latency of one NCCL collective inside a node (nccl-tests, small messages); twice that between
nodes."""


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks ``first, first + stride, ...`` that take part in one collective."""

    size: int
    stride: int

    def per_node(self, gpus_per_node: int) -> int:
        """Return the number of members that share a node."""
        return max(1, min(self.size, gpus_per_node // self.stride))


@dataclass(frozen=True, slots=True)
class Links:
    """A GPU's links: data-sheet bandwidth times the fraction that collectives reach."""

    gpu: Gpu
    efficiency: float

    def all_to_all(self, group: Group, bytes_per_rank: float) -> float:
        """Return the seconds for each rank to send an equal part of its bytes to every member.

        Transfers within the node and between nodes overlap.
        """
        if group.size == 1:
            return 0.0
        near = group.per_node(self.gpu.gpus_per_node)
        inside = bytes_per_rank * (near - 1) / group.size / self.gpu.nvlink_bytes_per_second
        outside = bytes_per_rank * (group.size - near) / group.size
        outside /= self.gpu.network_bytes_per_second
        return max(inside, outside) / self.efficiency + self._latency(group)

    def gather(self, group: Group, total_bytes: float) -> float:
        """Return the seconds of an all-gather to, or a reduce-scatter from, ``total_bytes`` a rank.

        Assumes a ring. Between nodes, each member of a node uses its own network adapter.
        """
        if group.size == 1:
            return 0.0
        near = group.per_node(self.gpu.gpus_per_node)
        bandwidth = self.gpu.nvlink_bytes_per_second
        if near < group.size:
            bandwidth = min(bandwidth, near * self.gpu.network_bytes_per_second)
        sent = total_bytes * (group.size - 1) / group.size
        return sent / (bandwidth * self.efficiency) + self._latency(group)

    def send(self, group: Group, num_bytes: float) -> float:
        """Return the seconds to send ``num_bytes`` to the next member."""
        if group.size == 1:
            return 0.0
        bandwidth = self.gpu.network_bytes_per_second
        if group.per_node(self.gpu.gpus_per_node) == group.size:
            bandwidth = self.gpu.nvlink_bytes_per_second
        return num_bytes / (bandwidth * self.efficiency) + self._latency(group)

    def _latency(self, group: Group) -> float:
        near = group.per_node(self.gpu.gpus_per_node)
        return LATENCY_SECONDS * (1 if near == group.size else 2)


AXES = ("tp", "cp", "dp_cp", "pp", "etp", "ep", "edp")
"""Axes of the groups that a layout communicates in; dense gradients are reduced over ``dp_cp``."""


def group_of(axis: str, degrees: Degrees) -> Group:
    """Return the size and stride of the groups along one axis of a layout."""
    d = degrees
    match axis:
        case "tp":
            return Group(d.tp, 1)
        case "cp":
            return Group(d.cp, d.tp)
        case "dp_cp":
            return Group(d.dp * d.cp, d.tp)
        case "etp":
            return Group(d.etp, 1)
        case "ep":
            return Group(d.ep, d.etp)
        case "edp":
            return Group(d.edp, d.etp * d.ep)
        case "pp":
            return Group(d.pp, d.gpus // d.pp)
        case _:
            raise KeyError(axis)
