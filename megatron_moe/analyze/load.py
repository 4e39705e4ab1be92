"""What counts of routed tokens say: balance of the experts, and how unlike domains choose them.

Shape letters of this module:

    Z  domains   L  MoE layers   E  num_moe_experts   X  any leading axes
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def shares(counts_XE: NDArray[Any]) -> Floats:
    """Of all choices, how many each expert got; zeros where there were none.

    >>> shares(np.array([3, 1])).tolist()
    [0.75, 0.25]
    """
    total_X1 = counts_XE.sum(axis=-1, keepdims=True)
    return counts_XE / np.maximum(total_X1, 1)


def entropy(counts_XE: NDArray[Any]) -> Floats:
    """Entropy of the shares in nats: log E where all experts get the same, 0 where one gets all.

    >>> float(np.exp(entropy(np.array([5, 5, 0, 0]))).round(6))
    2.0
    """
    share_XE = shares(counts_XE)
    log_XE = np.log(share_XE, where=share_XE > 0, out=np.zeros_like(share_XE))
    return -(share_XE * log_XE).sum(axis=-1) + 0.0  # no negative zero


def max_over_mean(counts_XE: NDArray[Any]) -> Floats:
    """Choices of the busiest expert over the mean: 1 is perfect balance, E / K the worst.

    >>> float(max_over_mean(np.array([6, 2, 0, 0])))
    3.0
    """
    return shares(counts_XE).max(axis=-1) * counts_XE.shape[-1]


def dead(counts_XE: NDArray[Any]) -> NDArray[np.int64]:
    """Experts that no token chose.

    >>> int(dead(np.array([6, 2, 0, 0])))
    2
    """
    return (counts_XE == 0).sum(axis=-1)


def distances(counts_ZLE: NDArray[Any]) -> Floats:
    """L2 distance of each two domains' shares, layer by layer: ``(L, Z, Z)``.

    As LLaMA-MoE compares domains (arXiv 2406.16554, section 5): 0 where both choose every expert
    equally often, the square root of 2 where each has one expert that the other never takes.

    >>> distances(np.array([[[4, 0]], [[0, 9]]]))[0].round(4).tolist()
    [[0.0, 1.4142], [1.4142, 0.0]]
    """
    share_LZE = shares(counts_ZLE).swapaxes(0, 1)
    apart_LZZE = share_LZE[:, :, None] - share_LZE[:, None]
    return np.sqrt((apart_LZZE**2).sum(axis=-1))


def distance_of_halves(counts_Z2LE: NDArray[Any]) -> Floats:
    """L2 distance of the shares of the two halves of each domain's text: ``(Z, L)``.

    What two texts of the same kind differ by, at half the length: the floor under `distances`.
    """
    share_Z2LE = shares(counts_Z2LE)
    return np.sqrt(((share_Z2LE[:, 0] - share_Z2LE[:, 1]) ** 2).sum(axis=-1))


def between_others(distance_LZZ: Floats) -> Floats:
    """Mean distance of two different domains, by layer; 0 where there is one domain.

    >>> between_others(np.array([[[0.0, 1.0], [1.0, 0.0]]])).tolist()
    [1.0]
    """
    domains = distance_LZZ.shape[-1]
    return distance_LZZ.sum(axis=(1, 2)) / max(domains * (domains - 1), 1)
