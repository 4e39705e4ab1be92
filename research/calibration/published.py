"""Published training throughput on which the time model is calibrated.

``published_mfu.yaml`` holds the rows with their sources (arXiv 2412.09952 and 2504.14960) and with
what their MFU counts. Rows under ``measurements`` are fitted; those under ``validation`` are not.
`row_case` fills in the values that a row omits, by the same rules for all rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from megatron_moe.planner.shape import MoeShape
from megatron_moe.planner.workload import Degrees, Workload

Convention = Literal["causal", "full_attention"]
"""Attention scores that an MFU counts: the triangle that a causal model needs, or the square."""

DEFAULT_GLOBAL_BATCH = 256
"""Sequences per step if a row does not give it: the batch of arXiv 2504.14960, tables 1 and 3."""

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
    """Whether attention and experts use different groups (folding); None if not stated."""
    mfu: float
    convention: Convention
    """Attention scores that ``mfu`` counts."""


def published() -> tuple[Published, ...]:
    """Return the calibration rows in the order of the file."""
    return _rows("measurements")


def validation() -> tuple[Published, ...]:
    """Return the rows that no constant is fitted to, in the order of the file."""
    return _rows("validation")


@cache
def _rows(key: str) -> tuple[Published, ...]:
    text = Path(__file__).with_name("published_mfu.yaml").read_text("utf-8")
    tree = yaml.safe_load(text)
    shapes = {name: model_shape(sizes) for name, sizes in tree["models"].items()}
    conventions = {name: source["convention"] for name, source in tree["sources"].items()}
    return tuple(
        row_case(row, shapes[row["model"]], conventions[row["source"]]) for row in tree[key]
    )


def model_shape(sizes: dict[str, Any]) -> MoeShape:
    """Return the shape of a model of the file, all of whose layers are MoE layers."""
    sizes = dict(sizes)
    return MoeShape(
        moe_layers=frozenset(range(sizes["num_layers"])),
        kv_channels=sizes["hidden_size"] // sizes["num_attention_heads"],
        shared_expert_size=sizes.pop("moe_shared_expert_intermediate_size", 0),
        **sizes,
    )


def row_case(row: dict[str, Any], shape: MoeShape, convention: Convention) -> Published:
    """Convert a row of the file to a case that the time model can predict.

    Values that a row does not give: one sequence per micro-batch; no recomputation (all rows fit
    without it); one model chunk per layer of a stage, because rows that differ only in the batch
    rule out the bubble of a single chunk; capacity factor 1 without padding.
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
        sequence_length=row.get("seq", SEQUENCE_OF_MODEL.get(row["model"], DEFAULT_SEQUENCE)),
        global_batch_size=row.get("gbs", DEFAULT_GLOBAL_BATCH),
        capacity_factor=row.get("cf", 1.0),
    )
    return Published(row["model"], shape, work, degrees, row.get("folding"), row["mfu"], convention)
