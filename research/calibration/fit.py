"""Fit the time model's constants, evaluate the fit on held-out models, and ablate its terms.

``python -m research.calibration.document`` writes the results to docs/planning.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megatron_moe.planner.calibration import FITTED, PRIOR, Calibration
from megatron_moe.planner.fit import fit_constants
from megatron_moe.planner.hardware import GPUS
from megatron_moe.planner.layer import Machine
from megatron_moe.planner.time import StepTime, step_time
from research.calibration.published import Convention, Published

ERROR_POINTS = 2.0
"""Expected standard deviation of a row's MFU in points; measurements vary by 1 between runs."""


@dataclass(frozen=True, slots=True)
class Score:
    """Agreement of predictions with published rows."""

    mean_absolute_error: float
    """In MFU points."""
    spearman: float
    """Rank correlation; tied values share their mean rank."""


def predict(row: Published, calibration: Calibration = FITTED) -> StepTime:
    """Predict the step time of a row on H100."""
    return step_time(row.shape, row.work, row.degrees, Machine(GPUS["h100"], calibration))


def predicted_mfu(
    row: Published, calibration: Calibration = FITTED, *, convention: Convention | None = None
) -> float:
    """Predict the MFU of a row in the convention of its source, or in another one."""
    return mfu_of(predict(row, calibration), convention or row.convention)


def mfu_of(time: StepTime, convention: Convention) -> float:
    """Return the MFU of a predicted step in one convention."""
    return time.mfu if convention == "causal" else time.mfu_full_attention


def fit(rows: Sequence[Published]) -> Calibration:
    """Return the most probable constants given the rows and priors."""

    def predicted(calibration: Calibration) -> NDArray[np.float64]:
        return np.array([predicted_mfu(row, calibration) for row in rows])

    published = np.array([row.mfu for row in rows])
    return fit_constants(predicted, published, spread=ERROR_POINTS, prior=PRIOR)


def leave_one_model_out(rows: Sequence[Published]) -> list[float]:
    """Return each row's MFU as predicted by a fit without the rows of its model."""
    fits = {
        model: fit([row for row in rows if row.model != model])
        for model in dict.fromkeys(row.model for row in rows)
    }
    return [predicted_mfu(row, fits[row.model]) for row in rows]


def score(predicted: Sequence[float], rows: Sequence[Published]) -> Score:
    """Return the agreement of predictions with the rows' published MFU."""
    published = np.array([row.mfu for row in rows])
    values = np.array(predicted)
    return Score(
        mean_absolute_error=float(np.abs(values - published).mean()),
        spearman=float(np.corrcoef(_ranks(values), _ranks(published))[0, 1]),
    )


def without(term: str, rows: Sequence[Published]) -> list[float]:
    """Return each row's predicted MFU if ``term`` took no time."""
    predicted = []
    for row in rows:
        time = predict(row)
        rest = time.step_seconds - time.parts[term]
        predicted.append(mfu_of(time, row.convention) * time.step_seconds / rest)
    return predicted


def rescaled(predicted: Sequence[float], rows: Sequence[Published]) -> list[float]:
    """Scale predictions by the factor that fits the rows best, to compare only their pattern."""
    values, published = np.array(predicted), np.array([row.mfu for row in rows])
    return list(values * (values @ published) / (values @ values))


def sensitivity(rows: Sequence[Published], *, global_batch: int) -> Score:
    """Return the leave-one-model-out score with another batch for rows that do not give one."""
    other = [
        replace(row, work=replace(row.work, global_batch_size=global_batch))
        if row.model == "llama3-8b-e8t2"
        else row
        for row in rows
    ]
    return score(leave_one_model_out(other), other)


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    rounded = values.round(6)
    return np.array([(rounded < v).sum() + ((rounded == v).sum() - 1) / 2 for v in rounded])
