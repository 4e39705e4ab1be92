"""Published training throughput that the time model is calibrated on, as cases it can predict.

``published_mfu.yaml`` holds the rows with their sources (arXiv 2412.09952 and 2504.14960). What a
row leaves open is filled in by the rules of `row_case`, one rule for all rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

from megatron_moe.planner.shape import MoeShape
from megatron_moe.planner.workload import Degrees, Workload

DEFAULT_GLOBAL_BATCH = 256
"""Sequences a step where a row names none: the batch of arXiv 2504.14960, tables 1 and 3."""

SEQUENCE_OF_MODEL = {"llama3-8b-e8t2": 8192}
DEFAULT_SEQUENCE = 4096


@dataclass(frozen=True, slots=True)
class Published:
    """One published measurement."""

    model: str
    shape: MoeShape
    work: Workload
    degrees: Degrees
    folding: bool | None
    """Whether attention and experts are folded onto different groups; None: the row is silent."""
    mfu: float


@cache
def published() -> tuple[Published, ...]:
    """The calibration rows, in the order of the file."""
    text = resources.files("megatron_moe.planner").joinpath("published_mfu.yaml").read_text("utf-8")
    tree = yaml.safe_load(text)
    shapes = {name: model_shape(sizes) for name, sizes in tree["models"].items()}
    return tuple(row_case(row, shapes[row["model"]]) for row in tree["measurements"])


def model_shape(sizes: dict[str, Any]) -> MoeShape:
    """A model of the file: every layer routes."""
    sizes = dict(sizes)
    return MoeShape(
        moe_layers=frozenset(range(sizes["num_layers"])),
        kv_channels=sizes["hidden_size"] // sizes["num_attention_heads"],
        shared_expert_size=sizes.pop("moe_shared_expert_intermediate_size", 0),
        **sizes,
    )


def row_case(row: dict[str, Any], shape: MoeShape) -> Published:
    """A row as a case.

    Rows that do not say otherwise: one sequence a micro-batch; nothing recomputed (all fit so);
    as many model chunks as a stage has layers, since rows that differ in the batch alone rule out
    the bubble of one chunk; capacity factor 1 without padding.
    """
    degrees = Degrees(
        gpus=row["gpus"],
        tp=row["tp"],
        cp=row["cp"],
        pp=row["pp"],
        vpp=row.get("vpp", shape.num_layers // row["pp"]),
        ep=row["ep"],
        etp=row["etp"],
    )
    work = Workload(
        sequence_length=SEQUENCE_OF_MODEL.get(row["model"], DEFAULT_SEQUENCE),
        global_batch_size=row.get("gbs", DEFAULT_GLOBAL_BATCH),
        capacity_factor=row.get("cf", 1.0),
    )
    return Published(row["model"], shape, work, degrees, row.get("folding"), row["mfu"])
