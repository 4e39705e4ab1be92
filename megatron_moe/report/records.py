"""What `megatron-moe evaluate` and `megatron-moe analyze` leave beside a run, read and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_moe.analyze.record import Analysis

Record = TypeVar("Record", bound="Evaluation | TaskScores | Analysis")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=True)


class Judged(_Section):
    """A model on one domain's held-out text."""

    tokens: int
    bytes: int | None = None
    loss: float
    perplexity: float
    bits_per_byte: float | None = None


class Evaluation(_Section):
    """evaluation/step-*.json."""

    schema_: Literal[1] = 1
    kind: Literal["evaluation"]
    step: int
    domains: dict[str, Judged]
    dense: dict[str, Judged] | None = None
    step_0: dict[str, Judged] | None = None
    remarks: list[str] = []
    """Why something is not there."""


class Score(_Section):
    """One figure of the harness."""

    task: str
    examples: int | None
    metric: str
    value: float | str | None
    stderr: float | None


class TaskScores(_Section):
    """evaluation/tasks-*.json."""

    kind: Literal["tasks"]
    step: int | None
    scores: list[Score]


def read_records(
    folder: Path, kind: type[Record], pattern: str = "step-*.json"
) -> tuple[list[Record], list[str]]:
    """Every record of a folder, by step; and of those not shown, what is wrong."""
    found, wrong = [], []
    for path in sorted(folder.glob(pattern)):
        try:
            record = kind.model_validate_json(path.read_text(encoding="utf-8"))
            if isinstance(record, Analysis):
                _check_shapes(record)
            found.append(record)
        except (OSError, ValueError, KeyError) as error:
            wrong.append(f"{folder.name}/{path.name} is not shown: {_reason(error)}")
    return sorted(found, key=lambda record: record.step or 0), wrong


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        return f"{where}: {first['msg']}" if where else first["msg"]
    return str(error)


def _check_shapes(found: Analysis) -> None:
    """Lists that pictures are made of must fit each other."""
    layers, experts, domains = len(found.layers), found.num_experts, len(found.domains)
    for name in found.domains:
        if np.shape(found.counts[name]) != (layers, experts):
            raise ValueError(f"counts of {name!r} are not {layers} layers x {experts} experts")
    if np.shape(found.distances.layers) != (layers, domains, domains):
        raise ValueError(f"distances.layers is not {layers} times {domains} x {domains}")
