"""What `megatron-moe evaluate` and `megatron-moe analyze` leave beside a run, read and checked.

Shape letters of this module:

    L  MoE layers   E  experts   N  domains
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

Matrix = list[list[float]]
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


class Distances(_Section):
    """How far apart two domains' choices of experts are: L2 of normalised counts."""

    layers: list[Matrix]
    mean: Matrix
    within: dict[str, list[float]] | None = None
    """By domain and layer, of the two halves of its text."""


class Similarity(_Section):
    """Cosines of experts' weights."""

    between_experts: list[Matrix]
    to_dense: list[list[float]] | None = None


class Analysis(_Section):
    """analysis/step-*.json."""

    kind: Literal["analysis"]
    step: int
    layers: list[int]
    num_experts: int
    topk: int
    domains: list[str]
    tokens: dict[str, int]
    counts: dict[str, Matrix]
    dropped: dict[str, list[float]]
    entropy: dict[str, list[float]]
    max_over_mean: dict[str, list[float]]
    dead: dict[str, list[int]]
    confidence: dict[str, list[float]]
    coactivation: list[Matrix]
    distances: Distances
    similarity: Similarity | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        layers, experts, domains = len(self.layers), self.num_experts, len(self.domains)
        for name in self.domains:
            if np.shape(self.counts[name]) != (layers, experts):
                raise ValueError(f"counts of {name!r} are not {layers} layers x {experts} experts")
        if np.shape(self.distances.layers) != (layers, domains, domains):
            raise ValueError(f"distances.layers is not {layers} times {domains} x {domains}")
        return self


def read_records(
    folder: Path, kind: type[Record], pattern: str = "step-*.json"
) -> tuple[list[Record], list[str]]:
    """Every record of a folder, by step; and of those not shown, what is wrong."""
    found, wrong = [], []
    for path in sorted(folder.glob(pattern)):
        try:
            found.append(kind.model_validate_json(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError) as error:
            wrong.append(f"{folder.name}/{path.name} is not shown: {_reason(error)}")
    return sorted(found, key=lambda record: record.step or 0), wrong


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        return f"{where}: {first['msg']}" if where else first["msg"]
    return str(error)
