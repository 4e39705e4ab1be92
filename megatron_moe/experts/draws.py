"""Random numbers that are a function of what they are for, never of who asks or in which order.

Every generator is keyed by (seed, layer, use, ...), so each rank draws what it needs and no more.
Weights are drawn in blocks of consecutive neurons of one expert: a rank that holds part of an
expert draws the blocks it meets, and any cut of the expert gives the same numbers.

Shape letters of this module:

    D  hidden_size   M  neurons of one expert
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

BLOCK_NEURONS = 128


class Use(IntEnum):
    """What numbers are drawn for. Zero is nothing: it would be the same key as a shorter one."""

    NEURONS = 1
    REINIT_MASK = 2
    REINIT_VALUES = 3
    NOISE = 4
    PERMUTATION = 5
    CLUSTERS = 6


def generator(seed: int, layer: int, *key: int) -> np.random.Generator:
    """The generator of one use; ``key`` opens with a `Use`, or is empty for the router's rows."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, layer, *key])))


def normal_rows(
    seed: int, layer: int, *key: int, neurons: slice, width: int
) -> NDArray[np.float32]:
    """Standard normal numbers for a run of an expert's neurons, ``(neurons, width)``.

    Args:
        seed: With ``layer`` and ``key``, which expert and matrix, and what for.
        layer: Global layer id.
        key: As for `generator`.
        neurons: Which of the expert's neurons, counted over the whole expert.
        width: Numbers of one neuron.
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
