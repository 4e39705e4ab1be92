"""The story of ``plan --calibrate``: fit the time model to a cluster's own bench records."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_moe.bench.record import StepsRecord, read_record, shape_of
from megatron_moe.config.load import RENAMED, build
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import ConfigError
from megatron_moe.planner.calibration import FITTED, Calibration
from megatron_moe.planner.fit import fit_constants
from megatron_moe.planner.hardware import GPUS, Gpu
from megatron_moe.planner.layer import Machine
from megatron_moe.planner.shape import MoeShape
from megatron_moe.planner.time import step_time
from megatron_moe.planner.workload import Degrees, Workload, degrees_of, workload_of

SPREAD = 0.05
"""Expected relative error of a prediction with the right constants."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One record as a case of the time model."""

    name: str
    gpu: Gpu
    shape: MoeShape
    work: Workload
    degrees: Degrees
    seconds: float

    def predicted(self, constants: Calibration) -> float:
        """Return the predicted seconds of a step."""
        machine = Machine(self.gpu, constants)
        return step_time(self.shape, self.work, self.degrees, machine).step_seconds


@dataclass(frozen=True, slots=True)
class Calibrated:
    """Constants that fit the records, and the errors before and after."""

    rows: tuple[Measured, ...]
    constants: Calibration

    def errors(self, constants: Calibration) -> list[float]:
        """Return the relative error of each prediction."""
        return [row.predicted(constants) / row.seconds - 1 for row in self.rows]

    def to_json(self) -> dict[str, Any]:
        """Return plain values, for ``--json`` and for the file that ``--constants`` reads."""
        before, after = self.errors(FITTED), self.errors(self.constants)
        return {
            "constants": asdict(self.constants),
            "constants_before": asdict(FITTED),
            "mean_absolute_error_before": float(np.abs(before).mean()),
            "mean_absolute_error_after": float(np.abs(after).mean()),
            "records": [
                {"name": row.name, "gpu": row.gpu.name, "step_seconds": row.seconds,
                 "error_before": first, "error_after": second}
                for row, first, second in zip(self.rows, before, after, strict=True)
            ],
        }  # fmt: skip

    def tables(self) -> RenderableType:
        """Return the errors and the constants as tables for a terminal."""
        before, after = self.errors(FITTED), self.errors(self.constants)
        errors = Table("record", "measured s", "error before", "error after", box=None)
        for row, first, second in zip(self.rows, before, after, strict=True):
            errors.add_row(row.name, f"{row.seconds:.3f}", f"{first:+.1%}", f"{second:+.1%}")
        means = [f"{np.abs(each).mean():.1%}" for each in (before, after)]
        errors.add_row("mean absolute error", "", *means)
        constants = Table("constant", "before", "after", box=None)
        pairs = zip(astuple(FITTED), astuple(self.constants), strict=True)
        for field, (old, new) in zip(fields(Calibration), pairs, strict=True):
            constants.add_row(field.name, f"{old:.3g}", f"{new:.3g}")
        note = "The error after the fit is of the records that were fitted, not of unseen layouts."
        return Group(errors, Text(), constants, Text(note))


def calibrate(paths: Sequence[Path]) -> Calibrated:
    """Fit the constants to records of ``megatron-moe bench``.

    Raises:
        ConfigError: There is no record, or one is not of timed steps on a known GPU.
    """
    if not paths:
        raise ConfigError("plan --calibrate needs records of megatron-moe bench: RECORD.json ...")
    rows = tuple(measured(path) for path in paths)

    def predict(constants: Calibration) -> np.ndarray:
        return np.log([row.predicted(constants) for row in rows])

    seconds = np.log([row.seconds for row in rows])
    return Calibrated(rows, fit_constants(predict, seconds, spread=SPREAD, prior=FITTED))


def measured(path: Path) -> Measured:
    """Read one record.

    Raises:
        ConfigError: It is not of timed steps, or of a device that the planner does not know.
    """
    record = read_record(path)
    if not isinstance(record, StepsRecord):
        raise ConfigError(f"{path} times collectives; --calibrate needs records of training steps")
    sections = {RENAMED.get(name, name): section for name, section in record.config.items()}
    config = build(RunConfig, sections)
    work = replace(workload_of(config), imbalance=max(1.0, record.load_imbalance.median))
    if config.run.engine == "auto" and "transformer-engine" not in record.surroundings.versions:
        work = replace(work, engine="torch")
    return Measured(
        f"{record.name}, {record.routing}",
        _gpu_of(record, path),
        shape_of(record.dense, record.config["moe"]),
        work,
        degrees_of(config, gpus=record.surroundings.ranks),
        record.step_seconds.median,
    )


def _gpu_of(record: StepsRecord, path: Path) -> Gpu:
    device = record.surroundings.device
    for name, gpu in GPUS.items():
        if re.search(rf"\b{name}\b", device.lower()):
            return gpu
    raise ConfigError(
        f"{path} was measured on {device}, which is not in the planner's table.\n"
        f"  known: {', '.join(GPUS)}"
    )
