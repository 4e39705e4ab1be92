"""Where a group's ranks lie and how long a collective over them takes.

Ranks are numbered tp (etp) fastest, so a group is an arithmetic progression of ranks: its stride is
the product of the faster axes. What of it shares a node follows from stride and size alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe.planner.hardware import Gpu
from megatron_moe.planner.workload import Degrees

LATENCY_SECONDS = 15e-6
"""Start of one NCCL collective inside a node (nccl-tests, small messages); twice that across."""


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks ``first, first + stride, ...`` that take part in one collective."""

    size: int
    stride: int

    def per_node(self, gpus_per_node: int) -> int:
        """Members that share a node."""
        return max(1, min(self.size, gpus_per_node // self.stride))


@dataclass(frozen=True, slots=True)
class Links:
    """A GPU's links as collectives see them: data-sheet bandwidth times what is reached of it."""

    gpu: Gpu
    efficiency: float

    def all_to_all(self, group: Group, bytes_per_rank: float) -> float:
        """Seconds in which each rank sends an equal part of its bytes to every member.

        Parts inside and outside of the node travel at the same time.
        """
        if group.size == 1:
            return 0.0
        near = group.per_node(self.gpu.gpus_per_node)
        inside = bytes_per_rank * (near - 1) / group.size / self.gpu.nvlink_bytes_per_second
        outside = bytes_per_rank * (group.size - near) / group.size
        outside /= self.gpu.network_bytes_per_second
        return max(inside, outside) / self.efficiency + self._latency(group)

    def gather(self, group: Group, total_bytes: float) -> float:
        """Seconds of an all-gather to, or a reduce-scatter from, ``total_bytes`` on each rank.

        A ring; across nodes each of a node's members drives its own adapter.
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
        """Seconds to hand ``num_bytes`` to the next member."""
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
"""Groups that a layout communicates in; dense gradients are reduced over ``dp_cp``."""


def group_of(axis: str, degrees: Degrees) -> Group:
    """The groups of one axis of a layout."""
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
