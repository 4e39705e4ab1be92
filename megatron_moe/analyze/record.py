"""run.dir/analysis/step-00000N.json: what an analysis found, for the report and for scripts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_moe.errors import DataError


class Part(BaseModel):
    """A piece of the record: frozen, no unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_by_name=True
    )


class Distances(Part):
    """L2 distances of the shares of choices that experts get, of each two domains."""

    layers: list[list[list[float]]]
    """By MoE layer, a row a domain."""
    mean: list[list[float]]
    """Over layers."""
    within: dict[str, list[float]]
    """By domain and layer, of the two halves of its text: what two texts of a kind differ by."""


class Similarities(Part):
    """Cosines of experts' weights, neuron by neuron of the dense layer."""

    between_experts: list[list[list[float]]]
    """By MoE layer."""
    to_dense: list[list[float]] | None
    """By MoE layer and expert, to the dense neurons it was made of; None: they are not at hand."""


class Analysis(Part):
    """What the routers of a checkpoint did with text, and what its experts have become.

    Lists named by layer follow ``layers``. Dropped choices are in ``counts``.
    """

    version: Literal[1] = Field(default=1, alias="schema")  # pydantic has a `schema` of its own
    kind: Literal["analysis"] = "analysis"
    checkpoint: str
    step: int
    seq_length: int
    layers: list[int]
    """Global ids of the MoE layers."""
    num_experts: int
    topk: int
    domains: list[str]
    """Held-out texts of the run's domains, then the sets that were given besides."""
    evaluation_sets: list[str]
    """Which of them are such sets."""
    tokens: dict[str, int]
    loss: dict[str, float]
    """Nats per token."""
    counts: dict[str, list[list[int]]]
    """By domain, layer and expert: tokens that chose it. A layer's sum is tokens x topk."""
    counts_of_halves: dict[str, list[list[list[int]]]]
    """The same of the first samples of a domain's text, and of its last."""
    dropped: dict[str, list[int]]
    """By domain and layer: choices that a capacity limit dropped."""
    entropy: dict[str, list[float]]
    """Of the experts' shares of the choices, nats; log E is perfect balance."""
    max_over_mean: dict[str, list[float]]
    """Choices of the busiest expert over the mean."""
    dead: dict[str, list[int]]
    """Experts that no token chose."""
    confidence: dict[str, list[float]]
    """Mean over tokens of the best expert's score, all E of a token together one."""
    coactivation: list[list[list[int]]]
    """By layer, over all domains: tokens that chose both experts, or, on the diagonal, it."""
    distances: Distances
    similarity: Similarities


def path_of(run_dir: Path, step: int) -> Path:
    """Where the analysis of a step lies."""
    return run_dir / "analysis" / f"step-{step:06d}.json"


def to_json(analysis: Analysis) -> dict[str, Any]:
    """As the file holds it."""
    return analysis.model_dump(mode="json", by_alias=True)


def write_analysis(analysis: Analysis, path: Path) -> None:
    """Write the file; a reader sees all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.partial")
    staged.write_text(json.dumps(to_json(analysis), allow_nan=False) + "\n", encoding="utf-8")
    staged.replace(path)


def read_analysis(path: Path) -> Analysis:
    """What `write_analysis` wrote.

    Raises:
        DataError: No such file, or one of another kind or schema.
    """
    try:
        return Analysis.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, ValidationError) as error:
        raise DataError(
            f"{path} is no analysis of schema 1: {'; '.join(str(error).splitlines()[:3])}\n"
            "  make it again with megatron-moe analyze"
        ) from error
