"""Balanced k-means: clusters of exactly equal size, assigned by solving min-cost flows.

Shape letters: X points, D features, C clusters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

ITERATIONS = 20
STEPS_OF_COST = 2**24
"""Resolution of integer costs. Rounding makes them independent of the summation order."""


def balanced_kmeans(
    points_XD: NDArray[np.float32], clusters: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Return the cluster of each point, ``(X,)``; every cluster has X / C points.

    This is Lloyd's algorithm with k-means++ initialization. Each iteration assigns all points at
    once with the minimum total squared distance for equal sizes, until this no longer decreases.
    """
    centers_CD = _spread_starts(points_XD, clusters, rng)
    best, cluster_X = None, np.zeros(len(points_XD), dtype=np.int64)
    for _ in range(ITERATIONS):
        assigned_X, cost = assign(_costs(points_XD, centers_CD))
        if best is not None and cost >= best:
            break
        best, cluster_X = cost, assigned_X
        centers_CD = np.stack(
            [points_XD[cluster_X == c].mean(axis=0, dtype=np.float64) for c in range(clusters)]
        ).astype(np.float32)
    return cluster_X


def assign(costs_XC: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    """Return the cheapest assignment of X points to C clusters of X / C points, and its cost."""
    from ortools.graph.python import min_cost_flow  # imported here: slow to import

    points, clusters = costs_XC.shape
    assert points % clusters == 0, (points, clusters)
    solver: Any = min_cost_flow.SimpleMinCostFlow()
    arcs = solver.add_arcs_with_capacity_and_unit_cost(
        np.repeat(np.arange(points), clusters),
        points + np.tile(np.arange(clusters), points),
        np.ones(points * clusters, dtype=np.int64),
        costs_XC.ravel(),
    )
    supplies = np.full(points + clusters, -(points // clusters), dtype=np.int64)
    supplies[:points] = 1
    solver.set_nodes_supplies(np.arange(points + clusters), supplies)
    status = solver.solve()
    assert status == solver.OPTIMAL, status
    return solver.flows(arcs).reshape(points, clusters).argmax(axis=1), int(solver.optimal_cost())


def assign_most(values_XC: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the cluster of each point, all of equal size, with the largest sum of values."""
    return assign(_as_integers(values_XC.max(axis=1, keepdims=True) - values_XC))[0]


def _costs(points_XD: NDArray[np.float32], centers_CD: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return squared distances as integers, without the terms that are equal for all clusters."""
    size_C = (centers_CD.astype(np.float64) ** 2).sum(axis=1)
    costs_XC = size_C - 2 * (points_XD @ centers_CD.T).astype(np.float64)
    return _as_integers(costs_XC - costs_XC.min(axis=1, keepdims=True))


def _as_integers(costs_XC: NDArray[np.float64]) -> NDArray[np.int64]:
    """Scale costs, zero or more, to integers."""
    largest = float(costs_XC.max()) or 1.0  # 0: all points are the same
    return np.rint(costs_XC / largest * STEPS_OF_COST).astype(np.int64)


def _spread_starts(
    points_XD: NDArray[np.float32], clusters: int, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Draw k-means++ starts, with probability proportional to the squared distance to others."""
    chosen = [int(rng.integers(len(points_XD)))]
    far_X = _squared_distance(points_XD, points_XD[chosen[0]])
    for _ in range(clusters - 1):
        total = far_X.sum()
        probability_X = far_X / total if total > 0 else None  # all points are the same
        chosen.append(int(rng.choice(len(points_XD), p=probability_X)))
        far_X = np.minimum(far_X, _squared_distance(points_XD, points_XD[chosen[-1]]))
    return points_XD[chosen]


def _squared_distance(
    points_XD: NDArray[np.float32], point_D: NDArray[np.float32]
) -> NDArray[np.float64]:
    return ((points_XD - point_D) ** 2).sum(axis=1, dtype=np.float64)
