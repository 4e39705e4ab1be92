"""Compute expert load balance, and distances between domains, from counts of routed tokens.

Shape letters of this module:

    Z  domains   L  MoE layers   E  num_moe_experts   X  any leading axes
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def shares(counts_XE: NDArray[Any]) -> Floats:
    """Return each expert's share of all choices; zeros if there are no choices.

    >>> shares(np.array([3, 1])).tolist()
    [0.75, 0.25]
    """
    total_X1 = counts_XE.sum(axis=-1, keepdims=True)
    return counts_XE / np.maximum(total_X1, 1)


def entropy(counts_XE: NDArray[Any]) -> Floats:
    """Return the entropy of the shares in nats: log E if uniform, 0 if one expert gets all.

    >>> float(np.exp(entropy(np.array([5, 5, 0, 0]))).round(6))
    2.0
    """
    share_XE = shares(counts_XE)
    log_XE = np.log(share_XE, where=share_XE > 0, out=np.zeros_like(share_XE))
    return -(share_XE * log_XE).sum(axis=-1) + 0.0  # no negative zero


def max_over_mean(counts_XE: NDArray[Any]) -> Floats:
    """Return the choices of the busiest expert relative to the mean: 1 is balanced, E / K is worst.

    >>> float(max_over_mean(np.array([6, 2, 0, 0])))
    3.0
    """
    return shares(counts_XE).max(axis=-1) * counts_XE.shape[-1]


def dead(counts_XE: NDArray[Any]) -> NDArray[np.int64]:
    """Return the number of experts that no token chose.

    >>> int(dead(np.array([6, 2, 0, 0])))
    2
    """
    return (counts_XE == 0).sum(axis=-1)


def distances(counts_ZLE: NDArray[Any]) -> Floats:
    """Return the L2 distance of the shares of each pair of domains, by layer: ``(L, Z, Z)``.

    LLaMA-MoE compares domains in the same way (arXiv 2406.16554, section 5): 0 if both choose every
    expert equally often, sqrt(2) if each uses a single expert that the other never uses.

    >>> distances(np.array([[[4, 0]], [[0, 9]]]))[0].round(4).tolist()
    [[0.0, 1.4142], [1.4142, 0.0]]
    """
    share_LZE = shares(counts_ZLE).swapaxes(0, 1)
    difference_LZZE = share_LZE[:, :, None] - share_LZE[:, None]
    return np.sqrt((difference_LZZE**2).sum(axis=-1))


def distance_of_halves(counts_Z2LE: NDArray[Any]) -> Floats:
    """Return the L2 distance of the shares of the two halves of each domain's text: ``(Z, L)``.

    It is the distance of two texts of the same kind, at half the length: a baseline for
    `distances`.
    """
    share_Z2LE = shares(counts_Z2LE)
    return np.sqrt(((share_Z2LE[:, 0] - share_Z2LE[:, 1]) ** 2).sum(axis=-1))


def between_others(distance_LZZ: Floats) -> Floats:
    """Return the mean distance between different domains, by layer; 0 if there is only one domain.

    >>> between_others(np.array([[[0.0, 1.0], [1.0, 0.0]]])).tolist()
    [1.0]
    """
    domains = distance_LZZ.shape[-1]
    return distance_LZZ.sum(axis=(1, 2)) / max(domains * (domains - 1), 1)
