"""Random numbers that depend only on their purpose, not on the rank or the order of calls.

Every generator is keyed by (seed, layer, use, ...), so that each rank draws only what it needs.
Weights are drawn in blocks of consecutive neurons of one expert. A rank that holds part of an
expert draws the blocks that overlap it, and any sharding of the expert gives the same numbers.

Shape letters of this module:

    D  hidden_size   M  neurons of one expert
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

BLOCK_NEURONS = 128


class Use(IntEnum):
    """Purpose of random numbers.

    Values start at 1: SeedSequence ignores trailing zeros, so 0 would collide with a shorter key.
    """

    NEURONS = 1
    REINIT_MASK = 2
    REINIT_VALUES = 3
    NOISE = 4
    PERMUTATION = 5
    CLUSTERS = 6
    TWINS = 7
    SHARED_NEURONS = 8
    ADAPTERS = 9


def generator(seed: int, layer: int, *key: int) -> np.random.Generator:
    """Return the generator for one use; ``key`` starts with a `Use`, or is empty for the router."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, layer, *key])))


def normal_rows(
    seed: int, layer: int, *key: int, neurons: slice, width: int
) -> NDArray[np.float32]:
    """Draw standard normal numbers for a slice of an expert's neurons, ``(neurons, width)``.

    Args:
        seed: Seed; with ``layer`` and ``key`` it identifies the use, the expert and the matrix.
        layer: Global layer id.
        key: See `generator`.
        neurons: Slice of the neurons of the whole expert.
        width: Numbers per neuron.
    """
    rows_MD = np.empty((neurons.stop - neurons.start, width), dtype=np.float32)
    first_block = neurons.start // BLOCK_NEURONS
    for block in range(first_block, -(-neurons.stop // BLOCK_NEURONS)):
        start = block * BLOCK_NEURONS
        drawn = generator(seed, layer, *key, block).standard_normal(
            (BLOCK_NEURONS, width), dtype=np.float32
        )
        begin, end = max(start, neurons.start), min(start + BLOCK_NEURONS, neurons.stop)
        rows_MD[begin - neurons.start : end - neurons.start] = drawn[begin - start : end - start]
    return rows_MD
