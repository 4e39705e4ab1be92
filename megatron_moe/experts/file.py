"""Read and write the plan file: the tables of each layer, with their recipe and dense model.

It is a safetensors file. Its header holds a JSON text: schema, recipe, hash of the plan, and
fingerprint of the dense checkpoint. Neurons are int32, so that a file takes a few megabytes for
the largest models.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from megatron_moe.errors import CheckpointError
from megatron_moe.experts.plan import ExpertPlan, LayerTable, hash_of
from megatron_moe.experts.recipe import SCHEMA
from megatron_moe.experts.solved import solved_folder
from megatron_moe.hf.disk import replacing
from megatron_moe.json_text import parse_json
from megatron_moe.regular_file import regular

PLAN_FILE = "plan.safetensors"
_KEY = "megatron_moe.expert_plan"
_HEADER = {"schema", "recipe", "hash", "source", "measured_on", "down", "checksum"}


def write_plan(
    path: Path, plan: ExpertPlan, *, source: str, measured_on: dict[str, Any] | None = None
) -> None:
    """Write ``plan`` with its tables; the file appears only when it is complete.

    Args:
        path: File to write.
        plan: Plan with a table for each layer that needs one.
        source: Fingerprint of the dense checkpoint.
        measured_on: Description of the measurement, for readers of the file.
    """
    arrays = {}
    for layer, table in plan.tables.items():
        for name, value in _arrays(table).items():
            arrays[f"layers.{layer}.{name}"] = value
    header = {
        "schema": SCHEMA,
        "recipe": plan.recipe.content(),
        "hash": plan.hash,
        "source": source,
        "measured_on": measured_on,
        "down": {layer: t.down_hash for layer, t in plan.tables.items() if t.down_hash},
    }
    header["checksum"] = _header_checksum(header)
    with replacing(path) as staged:
        save_file(arrays, staged, metadata={_KEY: json.dumps(header)})


def read_plan(path: Path, plan: ExpertPlan, *, source: str | None) -> ExpertPlan:
    """Return ``plan`` with the tables of a plan file for the same recipe and dense model.

    Args:
        path: File written by `write_plan`.
        plan: Plan of the configuration, without tables.
        source: Fingerprint of the dense checkpoint; None accepts any.

    Raises:
        CheckpointError: The file does not exist, is damaged, or has another recipe or model.
    """
    header, arrays = _read(path)
    if header.get("schema") != SCHEMA:
        raise CheckpointError(
            f"{path} has schema {header.get('schema')}, but this version reads {SCHEMA}.\n"
            "  create it again with megatron-moe construct"
        )
    expected = json.loads(json.dumps(plan.recipe.content()))
    if header["recipe"] != expected:
        raise CheckpointError(
            f"{path} was made for other settings:\n"
            + "\n".join(_differences(header["recipe"], expected))
            + "\n  create it again with megatron-moe construct, or restore the settings"
        )
    if source is not None and header["source"] != source:
        raise CheckpointError(
            f"{path} was made from another dense model (fingerprint {header['source'][:12]}) than "
            f"the one in source.path ({source[:12]}).\n"
            "  create it again with megatron-moe construct"
        )
    solved = solved_folder(path)
    try:
        tables = _tables(arrays, {int(i): digest for i, digest in header.get("down", {}).items()})
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    # A folder may be there without belonging to this plan: that of a fit of the router alone is
    # empty, and an earlier plan may have left one.
    belongs = bool(header.get("down")) and solved.is_dir()
    result = plan.with_tables(tables, solved=solved if belongs else None)
    if result.hash != header["hash"]:
        raise CheckpointError(
            f"{path} is damaged: its tables have hash {result.hash[:12]}, but its header has "
            f"{header['hash'][:12]}"
        )
    return result


def read_measured_on(path: Path) -> dict[str, Any] | None:
    """Return what a plan file says about its measurement and fit.

    Raises:
        CheckpointError: The file does not exist, or is damaged.
    """
    return _read(path)[0].get("measured_on")


def is_plan_file(path: Path) -> bool:
    """Return whether `write_plan` wrote this file, whatever its settings and its version."""
    try:
        with safe_open(regular(path), "numpy") as file:
            return _KEY in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def check_plan(path: Path) -> dict[int, str]:
    """Check a plan file against the hashes in it; return those of its solved matrices by layer.

    Raises:
        CheckpointError: The file does not exist, or is damaged.
    """
    header, arrays = _read(path)
    try:
        down = {int(layer): str(digest) for layer, digest in header.get("down", {}).items()}
        actual, written = hash_of(header["recipe"], _tables(arrays, down)), header["hash"]
        # Plans of earlier versions have no checksum, and no name that is unknown.
        known = header.keys() <= _HEADER and header.get("checksum") in (
            None, _header_checksum(header),
        )  # fmt: skip
        if not known:
            raise CheckpointError(f"{path} is damaged: its header does not fit the checksum in it")
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error
    if actual != written:
        raise CheckpointError(
            f"{path} is damaged: its tables have hash {actual[:12]}, but its header has "
            f"{written[:12]}"
        )
    return down


def _header_checksum(header: dict[str, Any]) -> str:
    rest = {name: value for name, value in header.items() if name != "checksum"}
    stored = json.loads(json.dumps(rest))  # numbers of layers become texts, as in the file
    return hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest()


def _arrays(table: LayerTable) -> dict[str, np.ndarray]:
    stored = {}
    for field in fields(table):
        value = getattr(table, field.name)
        if value is None or field.name == "down_hash":
            continue
        array = np.ascontiguousarray(value)
        stored[field.name] = array.astype(np.int32) if array.dtype == np.int64 else array
    return stored


def _tables(arrays: dict[str, np.ndarray], down: dict[int, str]) -> dict[int, LayerTable]:
    values_by_layer: dict[int, dict[str, Any]] = {i: {"down_hash": down[i]} for i in down}
    for key, array in arrays.items():
        layers, layer, name = key.split(".")
        if layers != "layers":
            raise ValueError(f"{key} is no name of a table")
        value = array.astype(np.int64) if array.dtype == np.int32 else array
        values_by_layer.setdefault(int(layer), {})[name] = value if value.ndim else float(value)
    return {layer: LayerTable(**values) for layer, values in values_by_layer.items()}


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    try:
        with safe_open(regular(path), "numpy") as file:
            header = parse_json((file.metadata() or {})[_KEY])
            return header, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise CheckpointError(
            f"there is no plan file {path}.\n  create it: megatron-moe construct CONFIG.yaml"
        ) from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except KeyError as error:
        raise CheckpointError(f"{path} is not a plan file: its header has no plan") from error
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is not a plan file, or is damaged: {error}") from error


_SETTINGS = {
    "num_experts": "moe.num_moe_experts",
    "expert_ffn_hidden_size": "moe.moe_ffn_hidden_size",
    "dense_ffn_hidden_size": "intermediate_size of the dense model",
    "hidden_size": "hidden_size of the dense model",
    "moe_layers": "moe.moe_layers",
    "shared_size": "moe.moe_shared_expert_intermediate_size",
    "num_sources": "models, with upcycle.mix_with",
    "weight_scales": "factors of gate, up and down, from upcycle.rescale and moe.moe_router_topk",
    "output_scale": "factor of the output, from upcycle.rescale and moe.moe_router_topk",
    "calibrated": "factor measured on text, with upcycle.rescale",
    "routing": "moe.moe_router_topk, moe.router_order, moe.moe_router_score_function",
    "source_experts": "experts of the source",
}
"""Names of a recipe's fields in messages; the others are settings of section upcycle."""


def _differences(stored: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    return [
        f"    {_SETTINGS.get(name, f'upcycle.{name}')}: the file has {stored.get(name)}, "
        f"the configuration {expected.get(name)}"
        for name in sorted(stored.keys() | expected.keys())
        if stored.get(name) != expected.get(name)
    ]
