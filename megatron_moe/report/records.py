"""Read and validate the files that `megatron-moe evaluate` and `megatron-moe analyze` write."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_moe.analyze.record import Analysis
from megatron_moe.regular_file import regular

Record = TypeVar("Record", bound="Evaluation | TaskScores | Analysis")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=True)


class DomainScore(_Section):
    """Scores of a model on one domain's held-out text."""

    tokens: int
    bytes: int | None = None
    loss: float
    perplexity: float
    bits_per_byte: float | None = None


class Evaluation(_Section):
    """Contents of evaluation/step-*.json."""

    schema_: Literal[1] = 1
    kind: Literal["evaluation"]
    step: int
    domains: dict[str, DomainScore]
    dense: dict[str, DomainScore] | None = None
    step_0: dict[str, DomainScore] | None = None
    remarks: list[str] = []
    """Reasons why parts are missing."""


class Score(_Section):
    """One score of lm-evaluation-harness."""

    task: str
    examples: int | None
    metric: str
    value: float | str | None
    stderr: float | None


class TaskScores(_Section):
    """Contents of evaluation/tasks-*.json."""

    kind: Literal["tasks"]
    step: int | None
    scores: list[Score]


def read_records(
    folder: Path, kind: type[Record], pattern: str = "step-*.json"
) -> tuple[list[Record], list[str]]:
    """Return the valid records of a folder by step, and a message for each invalid one."""
    records, problems = [], []
    for path in sorted(folder.glob(pattern)):
        try:
            record = kind.model_validate_json(regular(path).read_text(encoding="utf-8"))
            if isinstance(record, Analysis):
                _check_shapes(record)
            records.append(record)
        except (OSError, ValueError, KeyError) as error:
            problems.append(f"{folder.name}/{path.name} is not shown: {_reason(error)}")
    return sorted(records, key=lambda record: record.step or 0), problems


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        location = ".".join(map(str, first["loc"]))
        return f"{location}: {first['msg']}" if location else first["msg"]
    return str(error)


def _check_shapes(analysis: Analysis) -> None:
    """Check that the lists from which pictures are drawn have consistent shapes."""
    layers, experts, domains = len(analysis.layers), analysis.num_experts, len(analysis.domains)
    for name in analysis.domains:
        if np.shape(analysis.counts[name]) != (layers, experts):
            raise ValueError(f"counts of {name!r} are not {layers} layers x {experts} experts")
    if np.shape(analysis.distances.layers) != (layers, domains, domains):
        raise ValueError(f"distances.layers is not {layers} times {domains} x {domains}")
