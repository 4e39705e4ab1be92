"""Many steps in a picture's few columns, without losing a spike.

Shape letters of this module:

    S  steps   C  columns of the picture
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_moe.report.history import Array, Series

MOST_COLUMNS = 200
"""Points of a line and columns of a heat map; a figure is about 400 pixels wide."""


@dataclass(frozen=True, slots=True, eq=False)
class Thinned:
    """Runs of ``width`` logged steps, each as one column."""

    steps: NDArray[np.int64]
    """The last step of each run."""
    mean: Array
    low: Array
    high: Array
    width: int


def thin(series: Series, *, at_most: int = MOST_COLUMNS) -> Thinned:
    """Mean, lowest and highest value of runs of equal length; NaN counts where all are NaN.

    >>> thinned = thin(Series(np.arange(1, 6), np.array([1.0, 3, 5, 7, 2])), at_most=3)
    >>> thinned.steps.tolist(), thinned.mean.tolist(), thinned.high.tolist()
    ([2, 4, 5], [2.0, 6.0, 2.0], [3.0, 7.0, 2.0])
    """
    width = -(-len(series) // at_most)
    starts = range(0, len(series), width)
    runs = [series.values[start : start + width] for start in starts]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of runs that are NaN throughout
        mean, low, high = (
            np.stack([reduce(run, axis=0) for run in runs])
            for reduce in (np.nanmean, np.nanmin, np.nanmax)
        )
    ends = [min(start + width, len(series)) - 1 for start in starts]
    return Thinned(series.steps[ends], mean, low, high, width)


def sample(length: int, at_most: int) -> list[int]:
    """Evenly spaced indices, the first and the last among them.

    >>> sample(3, 5), sample(1000, 5)
    ([0, 1, 2], [0, 250, 500, 749, 999])
    """
    if length <= at_most:
        return list(range(length))
    return [round(i) for i in np.linspace(0, length - 1, at_most)]
