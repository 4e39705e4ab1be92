"""Fit the constants of the time model to measurements, with priors that bound their influence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, fields

import numpy as np
from numpy.typing import NDArray

from megatron_moe.planner.calibration import Calibration

Array = NDArray[np.float64]

PRIOR_SPREAD = 0.3
"""Standard deviation of a constant's logarithm around its prior."""

STEPS = 8
"""Gauss-Newton steps; the fit does not move after five."""


def fit_constants(
    predict: Callable[[Calibration], Array],
    measured: Array,
    *,
    spread: float,
    prior: Calibration,
) -> Calibration:
    """Return the most probable constants (Gauss-Newton on logarithms).

    Args:
        predict: Returns the predictions of all rows under some constants.
        measured: The measurements, in the same order and unit.
        spread: Standard deviation of a measurement around its prediction, in that unit.
        prior: Expected constants.
    """
    start = np.array(astuple(prior))

    def residuals(shift: Array) -> Array:
        errors = predict(_calibration(start * np.exp(shift))) - measured
        return np.concatenate([errors / spread, shift / PRIOR_SPREAD])

    shift = np.zeros(len(start))
    for _ in range(STEPS):
        here = residuals(shift)
        shift = shift - np.linalg.lstsq(_jacobian(residuals, shift, here), here, rcond=None)[0]
    return _calibration(start * np.exp(shift))


def _calibration(values: Array) -> Calibration:
    names = (field.name for field in fields(Calibration))
    return Calibration(**{name: float(v) for name, v in zip(names, values, strict=True)})


def _jacobian(function: Callable[[Array], Array], at: Array, here: Array) -> Array:
    step = 1e-4
    return np.stack([(function(at + step * axis) - here) / step for axis in np.eye(len(at))], 1)
