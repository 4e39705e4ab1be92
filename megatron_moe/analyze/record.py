"""Schema of run.dir/analysis/step-00000N.json, the results of an analysis."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_moe.errors import DataError
from megatron_moe.hf.disk import write_text
from megatron_moe.json_text import parse_json
from megatron_moe.regular_file import regular


class FrozenModel(BaseModel):
    """Base of the record's models: immutable, without unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_by_name=True
    )


class Distances(FrozenModel):
    """L2 distances between domains of the experts' shares of choices."""

    layers: list[list[list[float]]]
    """Distances by MoE layer, one row per domain."""
    mean: list[list[float]]
    """Mean over layers."""
    within: dict[str, list[float]]
    """Distance of the two halves of a domain's text, by domain and layer: a baseline."""


class Similarities(FrozenModel):
    """Cosine similarities of experts' weights, with neurons aligned by dense neuron."""

    between_experts: list[list[list[float]]]
    """Similarity of each pair of experts, by MoE layer."""
    to_dense: list[list[float]] | None
    """Similarity of each expert to its source neurons, by MoE layer; None if these are missing."""


class Analysis(FrozenModel):
    """Routing statistics of a checkpoint on text, and similarities of its experts.

    Lists by layer are in the order of ``layers``. ``counts`` includes dropped choices.
    """

    version: Literal[1] = Field(default=1, alias="schema")  # pydantic reserves `schema`
    kind: Literal["analysis"] = "analysis"
    checkpoint: str
    step: int
    seq_length: int
    layers: list[int]
    """Global ids of the MoE layers."""
    num_experts: int
    topk: int
    domains: list[str]
    """Names of the texts: the run's domains (held-out text), then additional evaluation sets."""
    evaluation_sets: list[str]
    """Names in ``domains`` that are additional evaluation sets."""
    tokens: dict[str, int]
    loss: dict[str, float]
    """Loss by domain, in nats per token."""
    counts: dict[str, list[list[int]]]
    """Tokens that chose an expert, by domain, layer and expert. A layer sums to tokens x topk."""
    counts_of_halves: dict[str, list[list[list[int]]]]
    """`counts` of the first half of a domain's samples, and of the second."""
    dropped: dict[str, list[int]]
    """Choices that a capacity limit dropped, by domain and layer."""
    entropy: dict[str, list[float]]
    """Entropy of the experts' shares of choices, in nats; log E is perfect balance."""
    max_over_mean: dict[str, list[float]]
    """Choices of the busiest expert relative to the mean."""
    dead: dict[str, list[int]]
    """Number of experts that no token chose."""
    confidence: dict[str, list[float]]
    """Mean over tokens of the best expert's score; the E scores of a token sum to one."""
    coactivation: list[list[list[int]]]
    """Tokens that chose both experts (on the diagonal: the expert), by layer, over all domains."""
    distances: Distances
    similarity: Similarities


def path_of(run_dir: Path, step: int) -> Path:
    """Return the path of the analysis of a step."""
    return run_dir / "analysis" / f"step-{step:06d}.json"


def to_json(analysis: Analysis) -> dict[str, Any]:
    """Return the analysis as in its file."""
    return analysis.model_dump(mode="json", by_alias=True)


def write_analysis(analysis: Analysis, path: Path) -> None:
    """Write the file atomically."""
    write_text(path, json.dumps(to_json(analysis), allow_nan=False) + "\n")


def read_analysis(path: Path) -> Analysis:
    """Read a file written by `write_analysis`.

    Raises:
        DataError: The file is missing, or has another kind or schema.
    """
    try:
        return Analysis.model_validate(parse_json(regular(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, ValidationError) as error:
        raise DataError(
            f"{path} is not an analysis of schema 1: {'; '.join(str(error).splitlines()[:3])}\n"
            "  run megatron-moe analyze again"
        ) from error
