"""Merge experts of a MoE source: which into one, in which order of neurons, with which weights.

Experts whose router rows are alike are grouped: the two groups with the largest mean cosine become
one until as many are left as wanted (average linkage, as HC-SMoE, arXiv 2410.08589, does with
outputs). The neurons of an expert can be in any order, so those of each member are first matched
with those of the busiest member, one to one, for the largest sum of inner products (Git Re-Basin,
arXiv 2209.04836). Then weights, router rows and biases are averaged by load (M-SMoE, arXiv
2310.01334).

Shape letters: E num_moe_experts, O experts of the source, M neurons of an expert, D hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_moe.experts.split import unit_rows

STEPS_OF_COST = 2**24
"""Resolution of integer costs. Rounding makes them independent of the summation order."""

Matrices = Sequence[NDArray[np.float32]]
"""Gate, up and down of an expert, one row per neuron: ``(M, D)`` each."""


@dataclass(frozen=True, slots=True)
class Merge:
    """Members of the merged experts of one layer."""

    into_O: NDArray[np.int64]
    """Merged expert that each source expert becomes a part of."""
    weight_O: NDArray[np.float64]
    """Weight of each source expert; those of a merged expert sum to one."""
    order_OM: NDArray[np.int64]
    """Neuron of each source expert that each neuron of the merged one gets."""

    def members(self, expert: int) -> list[int]:
        """Return the source experts of a merged expert, ascending."""
        return np.flatnonzero(self.into_O == expert).tolist()

    def mixing(self) -> NDArray[np.float64]:
        """Return the weight of each source expert in each merged expert."""
        experts = int(self.into_O.max()) + 1
        return (self.into_O == np.arange(experts)[:, None]) * self.weight_O


def merged(
    router_OD: NDArray[np.float32],
    load_O: NDArray[np.float64],
    experts: int,
    read: Callable[[int], Matrices],
) -> Merge:
    """Merge the experts of a layer into ``experts``.

    Args:
        router_OD: Rows of the router.
        load_O: Number of tokens that chose each expert.
        experts: Number of merged experts.
        read: Function that returns the matrices of a source expert.
    """
    into_O = groups(router_OD, experts)
    weight_O, order = np.zeros(len(load_O)), {}
    for expert in range(experts):
        members = np.flatnonzero(into_O == expert)
        load = load_O[members] + (load_O[members].sum() == 0)  # equal weights if none was chosen
        weight_O[members] = load / load.sum()
        base = int(members[np.argmax(load)])
        target = read(base)
        for member in members.tolist():
            same = np.arange(len(target[0]))
            order[member] = same if member == base else matched(target, read(member))
    return Merge(into_O, weight_O, np.stack([order[o] for o in range(len(load_O))]))


def groups(router_OD: NDArray[np.float32], experts: int) -> NDArray[np.int64]:
    """Return the group of each row, ``(O,)``; groups are numbered by their first row.

    >>> groups(np.array([[1.0, 0], [0, 1], [1, 0.1]], dtype=np.float32), 2)
    array([0, 1, 0])
    """
    unit_OD = unit_rows(router_OD).astype(np.float64)
    sums_GG = np.round(unit_OD @ unit_OD.T, 9)  # the same on any machine
    size_G, into_O = np.ones(len(unit_OD)), np.arange(len(unit_OD))
    for _ in range(len(unit_OD) - experts):
        mean_GG = sums_GG / np.outer(size_G, size_G)
        mean_GG[~np.triu(np.ones_like(mean_GG, dtype=bool), 1)] = -np.inf
        one, other = np.unravel_index(np.argmax(mean_GG), mean_GG.shape)
        sums_GG[one] += sums_GG[other]
        sums_GG[:, one] += sums_GG[:, other]
        size_G[one] += size_G[other]
        sums_GG, size_G = (
            np.delete(np.delete(sums_GG, other, 0), other, 1),
            np.delete(size_G, other),
        )
        into_O[into_O == other] = one
        into_O[into_O > other] -= 1
    return into_O


def matched(target: Matrices, source: Matrices) -> NDArray[np.int64]:
    """Return the order of the neurons of ``source`` that is most like ``target``, ``(M,)``."""
    from ortools.graph.python import linear_sum_assignment  # imported here: slow to import

    like_MM = sum((t @ s.T).astype(np.float64) for t, s in zip(target, source, strict=True))
    largest = float(np.abs(like_MM).max()) or 1.0  # 0: all weights are zero
    cost_MM = np.rint(-like_MM / largest * STEPS_OF_COST).astype(np.int64)
    neurons = len(cost_MM)
    solver: Any = linear_sum_assignment.SimpleLinearSumAssignment()
    solver.add_arcs_with_cost(
        np.repeat(np.arange(neurons), neurons),
        np.tile(np.arange(neurons), neurons),
        cost_MM.ravel(),
    )
    status = solver.solve()
    assert status == solver.OPTIMAL, status
    return np.array([solver.right_mate(neuron) for neuron in range(neurons)])
