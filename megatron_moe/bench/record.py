"""The record of a benchmark: one JSON object with all that is needed to repeat and to judge it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from megatron_moe.config.load import build
from megatron_moe.config.moe import Moe
from megatron_moe.errors import ConfigError
from megatron_moe.hf.disk import write_text
from megatron_moe.hf.spec import ModelSpec
from megatron_moe.json_text import parse_json
from megatron_moe.planner.flops import SequenceFlops, sequence_flops
from megatron_moe.planner.shape import MoeShape, upcycled_shape

PHASES: tuple[str, ...] = (
    "data", "forward", "dispatch", "experts", "combine", "backward", "reduce", "optimizer", "other",
)  # fmt: skip


class Part(BaseModel):
    """A piece of a record: frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Spread(Part):
    """A number that was measured several times."""

    median: float
    p10: float
    p90: float

    def __str__(self) -> str:
        return f"{self.median:.4g} [{self.p10:.4g}, {self.p90:.4g}]"


def spread(values: Sequence[float]) -> Spread:
    """Median, 10th and 90th percentile, linear between neighbors.

    >>> spread([3.0, 1.0, 2.0])
    Spread(median=2.0, p10=1.2, p90=2.8)
    """
    p10, median, p90 = (float(v) for v in np.percentile(values, [10, 50, 90]).round(12))
    return Spread(median=median, p10=p10, p90=p90)


class Surroundings(Part):
    """The machine, versions and variables of a measurement."""

    time: str
    """When it ended, UTC."""
    command: list[str]
    commit: str | None
    """Commit of the working tree of the package; None outside a working tree."""
    uncommitted_changes: bool | None
    versions: dict[str, str]
    device: str
    device_memory_gib: float
    ranks: int
    hosts: int
    environment: dict[str, str]
    """Variables that change how NCCL, CUDA and OpenMP work."""


class Mfu(Part):
    """MFU and its formula."""

    formula: str
    flops_per_sequence: float
    """With the attention that a causal model needs."""
    flops_per_sequence_full_attention: float
    """With the whole square of the attention scores."""
    denominator_flops_per_second: float
    denominator_source: str


class Capacity(Part):
    """Upper bound on the tokens of an expert."""

    factor: float
    formula: str
    padded: bool
    tokens_per_expert: int
    """Tokens of one rank's micro-batch."""


class Phases(Part):
    """Seconds of a step by phase, from separate steps that are slower than the timed ones."""

    how: str
    steps: int
    step_seconds: Spread
    seconds: dict[str, Spread]
    """By phase, mean over ranks; together one step."""


class StepsRecord(Part):
    """Timed training steps of one configuration."""

    kind: Literal["steps"] = "steps"
    name: str
    surroundings: Surroundings
    config: dict[str, Any]
    """Every setting, defaults included."""
    dense: dict[str, Any]
    """Shape of the dense model."""
    layout: dict[str, int]
    total_parameters: int
    active_parameters: int
    routing: Literal["natural", "balanced"]
    weights: Literal["dense checkpoint", "random"]
    data: Literal["text", "random tokens"]
    capacity: Capacity | None
    """None: dropless."""
    warmup_steps: int
    timed_steps: int
    each_step_seconds: list[float]
    """The slowest rank's."""
    step_seconds: Spread
    tokens_per_second_per_gpu: Spread
    tflops_per_gpu: Spread
    """Counts the attention that a causal model needs, as `mfu` does."""
    mfu: Spread
    """A fraction of one."""
    mfu_full_attention: Spread
    """A fraction of one, with the whole square of the attention scores."""
    mfu_is: Mfu
    phases: Phases
    load_imbalance: Spread
    """Busiest expert's tokens over the mean, before any is dropped; mean of MoE layers."""
    drop_rate: Spread
    peak_memory_gib: float
    """Maximum over ranks; resident memory on CPU."""
    last_loss: float


class Timing(Part):
    """One collective at one size."""

    collective: str
    group: str
    ranks: int
    bytes: int
    """Bytes of the larger of input and output, as nccl-tests counts."""
    seconds: Spread
    bus_gb_per_second: float
    """At the median: bytes that must cross a rank's link, whatever the algorithm, over time."""


class CollectivesRecord(Part):
    """Bandwidth of collectives by size."""

    kind: Literal["collectives"] = "collectives"
    surroundings: Surroundings
    timings: list[Timing]


Record = Annotated[StepsRecord | CollectivesRecord, Field(discriminator="kind")]
_RECORD: TypeAdapter[Record] = TypeAdapter(Record)


def write_record(record: Record, path: Path) -> None:
    """Write the record; a reader sees all of it or none."""
    write_text(path, record.model_dump_json(indent=1) + "\n")


def read_record(path: Path) -> Record:
    """The record in a file.

    Raises:
        ConfigError: There is none, or it is not what `write_record` writes.
    """
    try:
        return _RECORD.validate_python(_with_both_mfu(parse_json(path.read_text("utf-8"))))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValidationError, ValueError, KeyError, TypeError) as error:
        first = str(error).splitlines()[:3]
        raise ConfigError(
            f"{path} is not a record of megatron-moe bench: {'; '.join(first)}"
        ) from (error)


def _with_both_mfu(tree: dict[str, Any]) -> dict[str, Any]:
    """Add the causal MFU to a record of version 0.1.0, whose figures counted the whole square.

    Both follow from the same seconds, so the old figure times the ratio of FLOPs is the new one.
    """
    if tree.get("kind") != "steps" or "mfu_full_attention" in tree:
        return tree
    formula = tree["mfu_is"]
    flops = _flops_of(tree)
    full = formula["flops_per_sequence"]
    return tree | {
        "mfu_full_attention": tree["mfu"],
        "mfu": _times(tree["mfu"], flops.causal / full),
        "tflops_per_gpu": _times(tree["tflops_per_gpu"], flops.causal / full),
        "mfu_is": formula
        | {
            "formula": formula["formula"].replace("full attention", "causal attention"),
            "flops_per_sequence": flops.causal,
            "flops_per_sequence_full_attention": full,
        },
    }


def _flops_of(tree: dict[str, Any]) -> SequenceFlops:
    """Count the model of a record."""
    config = tree["config"]
    shape = shape_of(tree["dense"], config["moe"])
    return sequence_flops(shape, config["data"]["seq_length"])


def shape_of(dense: dict[str, Any], moe: dict[str, Any]) -> MoeShape:
    """Return the shape of a record's model from its dense model and its section ``moe``."""
    return upcycled_shape(ModelSpec(**dense), build(Moe, moe))


def _times(value: dict[str, float], factor: float) -> dict[str, float]:
    return {name: number * factor for name, number in value.items()}
