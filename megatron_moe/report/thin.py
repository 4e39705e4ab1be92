"""Reduce many steps to the few columns of a picture without losing spikes.

Shape letters of this module:

    S  steps   C  columns of the picture
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_moe.report.history import Array, Series

MAX_COLUMNS = 200
"""Maximum points of a line and columns of a heat map; a figure is about 400 pixels wide."""


@dataclass(frozen=True, slots=True, eq=False)
class Thinned:
    """A series in which each column stands for ``width`` consecutive logged steps."""

    steps: NDArray[np.int64]
    """The last step of each column."""
    mean: Array
    low: Array
    high: Array
    width: int


def thin(series: Series, *, at_most: int = MAX_COLUMNS) -> Thinned:
    """Return mean, minimum and maximum of windows of equal length, ignoring NaN unless all are NaN.

    >>> thinned = thin(Series(np.arange(1, 6), np.array([1.0, 3, 5, 7, 2])), at_most=3)
    >>> thinned.steps.tolist(), thinned.mean.tolist(), thinned.high.tolist()
    ([2, 4, 5], [2.0, 6.0, 2.0], [3.0, 7.0, 2.0])
    """
    width = -(-len(series) // at_most)
    starts = range(0, len(series), width)
    windows = [series.values[start : start + width] for start in starts]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # about windows with only NaN
        mean, low, high = (
            np.stack([reduce(window, axis=0) for window in windows])
            for reduce in (np.nanmean, np.nanmin, np.nanmax)
        )
    ends = [min(start + width, len(series)) - 1 for start in starts]
    return Thinned(series.steps[ends], mean, low, high, width)


def sample(length: int, at_most: int) -> list[int]:
    """Return at most ``at_most`` evenly spaced indices, including the first and the last.

    >>> sample(3, 5), sample(1000, 5)
    ([0, 1, 2], [0, 250, 500, 749, 999])
    """
    if length <= at_most:
        return list(range(length))
    return [round(i) for i in np.linspace(0, length - 1, at_most)]
