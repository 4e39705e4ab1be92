"""From a checkpoint of any layout to a Hugging Face MoE folder, one tensor at a time.

The name table is read right to left: for every row of every layer, the global tensor is loaded from
the checkpoint (one expert of it where it has experts), cut into the tensors Hugging Face wants,
and written. There is no model, Megatron's or transformers', and never more than one expert or one
embedding in memory. Adapters are added to their weights, and factors that a run applies to outputs
are multiplied into them.

Shape letters of this module:

    D  hidden_size   M  neurons of one expert   E  num_moe_experts   V  vocab_size
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from megatron_moe.checkpoint import folder as folders
from megatron_moe.checkpoint.global_tensors import GlobalTensors
from megatron_moe.checkpoint.keys import checkpoint_key
from megatron_moe.checkpoint.merged import read_merged
from megatron_moe.commands.export_config import (
    check_export,
    exported_shared_size,
    moe_config,
    read_source_config,
)
from megatron_moe.commands.export_dense import (
    DenseArchitecture,
    dense_architecture,
    dense_hf_config,
)
from megatron_moe.commands.model_card import model_card
from megatron_moe.config.moe import Moe
from megatron_moe.config.run import RunConfig
from megatron_moe.config.train import Lora
from megatron_moe.errors import CheckpointError
from megatron_moe.experts.plan import ExpertPlan, moe_layer_ids
from megatron_moe.hf.dtypes import OF_PRECISION
from megatron_moe.hf.families import FAMILIES
from megatron_moe.hf.names import (
    MOE_NAMES,
    ROWS,
    Architecture,
    Row,
    Scope,
    Sharding,
    has_row,
    shapes_of,
)
from megatron_moe.hf.spec import ModelSpec, read_spec
from megatron_moe.hf.writer import FolderWriter

Dtype = Literal["fp32", "bf16", "fp16"]
_DTYPES: dict[Dtype, torch.dtype] = {
    "fp32": OF_PRECISION["fp32"],
    "bf16": OF_PRECISION["bf16"],
    "fp16": torch.float16,
}


def export_checkpoint(
    source: Path,
    out: Path,
    *,
    dtype: Dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    name: str | None = None,
    dense: bool = False,
) -> Architecture | DenseArchitecture:
    """Write the model of a checkpoint as a Hugging Face folder.

    Args:
        source: A run folder (its newest checkpoint is taken) or a checkpoint folder.
        out: Folder to create: complete, or not there.
        dtype: dtype of the weights; None uses the run's precision.
        max_shard_bytes: Maximum size of a file of weights.
        name: Name of the model in its card; None uses that of the folder.
        dense: Write a model of one expert per layer as a dense model.

    Returns:
        The architecture that means the same as the trained model.

    Raises:
        CheckpointError: No checkpoint, no architecture that means the same, ``out`` exists, or a
            value is too large for ``dtype``.
    """
    checkpoint = folders.find_checkpoint(source)
    config, spec = folders.read_config(checkpoint), read_spec(folders.source_copy(checkpoint))
    architecture = (dense_architecture if dense else architecture_for)(spec, config.moe)
    kind: Dtype = dtype or config.train.precision
    hf_config = _config_of_export(checkpoint, config, spec, architecture, _DTYPES[kind])
    entries = list(_entries(spec, config.moe, architecture))
    announced = {
        tensor_name: (shape, _dtype_of(entry.row, _DTYPES[kind]))
        for entry in entries
        for tensor_name, shape in zip(entry.names, entry.shapes, strict=True)
    }
    half_open = architecture == "Qwen2MoeForCausalLM" and not config.moe.moe_shared_expert_gate
    plan = folders.plan_of(checkpoint, spec, config)
    card = _card(checkpoint, out, config, spec, architecture=architecture, dtype=kind, name=name)
    with (
        GlobalTensors(checkpoint) as tensors,
        FolderWriter(out, announced, max_shard_bytes=max_shard_bytes) as writer,
    ):
        for entry in entries:
            factors = _factors(entry, plan, spec, half_open=half_open)
            values = _values(
                entry, tensors, spec, _dtype_of(entry.row, _DTYPES[kind]), factors, config.lora
            )
            for tensor_name, tensor in zip(entry.names, values, strict=True):
                writer.write(tensor_name, tensor)
        writer.add_file("config.json", (json.dumps(hf_config, indent=2) + "\n").encode())
        writer.add_file("README.md", card.encode())
        for file in sorted(folders.source_copy(checkpoint).iterdir()):
            if file.name != "config.json":
                writer.add_file(file.name, file)
    return architecture


def has_adapters(source: Path) -> bool:
    """Return whether an export of a run or checkpoint adds adapters to its weights."""
    return bool(folders.read_config(folders.find_checkpoint(source)).lora.rank)


def _card(
    checkpoint: Path,
    out: Path,
    config: RunConfig,
    spec: ModelSpec,
    *,
    architecture: Architecture | DenseArchitecture,
    dtype: Dtype,
    name: str | None,
) -> str:
    """Return the model card of an export to ``out``."""
    progress = folders.read_progress(checkpoint)
    run_dir, folder = folders.in_its_run(checkpoint).parents[1], out.resolve()
    # A folder in that of its run, such as runs/demo/hf, is called like every other run's.
    title = run_dir.name if name is None and folder.parent == run_dir else None
    return model_card(
        config=config, spec=spec, progress=progress,
        tokens=folders.tokens_of(progress, checkpoint), architecture=architecture, dtype=dtype,
        run_dir=run_dir, name=name or folder.name, title=title,
    )  # fmt: skip


def _config_of_export(
    checkpoint: Path,
    config: RunConfig,
    spec: ModelSpec,
    architecture: Architecture | DenseArchitecture,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Return the config.json of the export, after comparing it with that of the source.

    Raises:
        CheckpointError: transformers would read another meaning into it.
    """
    source_config = read_source_config(folders.source_copy(checkpoint))
    if architecture in MOE_NAMES:
        hf_config = moe_config(spec, config, architecture, source_config)
    else:
        as_dense = cast("DenseArchitecture", architecture)
        hf_config = dense_hf_config(spec, config, as_dense, source_config)
    hf_config["dtype"] = str(dtype).removeprefix("torch.")
    check_export(hf_config, spec.family, source_config)
    return hf_config


def _values(
    entry: _Entry,
    tensors: GlobalTensors,
    spec: ModelSpec,
    dtype: torch.dtype,
    factors: tuple[float, ...],
    lora: Lora,
) -> list[Tensor]:
    """Return the Hugging Face tensors of an entry, with its adapter added."""
    if entry.key is None:
        return [torch.zeros(shape, dtype=dtype) for shape in entry.shapes]
    folded = any(factor != 1 for factor in factors)
    read_as = torch.float32 if folded else dtype
    fused = read_merged(
        tensors, entry.key, entry.row, lora, layer=entry.layer, expert=entry.expert, dtype=read_as
    )
    cut = [
        _folded(tensor, factor, dtype)
        for tensor, factor in zip(_cut(fused, entry, spec), factors, strict=True)
    ]
    for tensor in cut:
        _check_range(tensor, entry.key)
    return [_padded(tensor, shape) for tensor, shape in zip(cut, entry.shapes, strict=True)]


def _check_range(tensor: Tensor, key: str) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(
            f"{key} has values that {tensor.dtype} cannot hold, so the export would hold "
            "infinities.\n  use --dtype bf16 or fp32"
        )


_LINEAR_AFTER_TRAINING = ("linear", "noisy_linear")
"""Values of moe.router_gate that are one linear layer once training ends."""


def architecture_for(spec: ModelSpec, moe: Moe) -> Architecture:
    """The Hugging Face architecture that computes what the trained model computes.

    Raises:
        CheckpointError: There is none; says why.
    """
    if spec.experts is not None:  # rules keep what its architecture computes
        return cast("Architecture", FAMILIES[spec.family].architecture)
    if spec.layers_without_rotary:
        raise CheckpointError(
            f"no Hugging Face architecture means the same as a MoE of a {spec.family} model, whose "
            f"layers {', '.join(map(str, spec.layers_without_rotary))} have no rotary embedding.\n"
            "  keep the checkpoint, which trains, evaluates and generates"
        )
    if moe.router_gate not in _LINEAR_AFTER_TRAINING:
        raise CheckpointError(
            f"no Hugging Face architecture means the same as a {spec.family} model with "
            f"moe.router_gate ({moe.router_gate}): all of them route by one linear layer.\n"
            "  use moe.router_gate=noisy_linear, or keep the checkpoint"
        )
    if spec.post_norms:
        return _of_post_norms(spec, moe)
    if moe.moe_router_score_function == "sigmoid":
        return _of_sigmoid_scores(spec, moe)
    shared = moe.moe_shared_expert_intermediate_size
    if spec.qk_layernorm and shared:
        raise CheckpointError(
            f"no Hugging Face architecture means the same as a {spec.family} model with a shared "
            f"expert (moe.moe_shared_expert_intermediate_size {shared}): Qwen3-MoE has none, and "
            "Qwen2-MoE and Mixtral have no norms on q and k.\n"
            "  build without a shared expert, or keep the checkpoint"
        )
    if spec.qk_layernorm:
        return "Qwen3MoeForCausalLM"
    # Mixtral routes in every layer, renormalizes, and has neither biases nor a shared expert.
    mixed = len(moe_layer_ids(moe, spec.num_layers)) < spec.num_layers
    if spec.qkv_bias or shared or mixed or moe.router_order == "softmax_topk":
        return "Qwen2MoeForCausalLM"
    return "MixtralForCausalLM"


def _of_post_norms(spec: ModelSpec, moe: Moe) -> Architecture:
    """Return the architecture with norms after attention and experts.

    Raises:
        CheckpointError: It does not have this model's layers.
    """
    reasons = {
        "moe.moe_router_score_function (sigmoid)": moe.moe_router_score_function == "sigmoid",
        "a shared expert (moe.moe_shared_expert_intermediate_size)": bool(moe.shared_size),
        "dense layers": len(moe_layer_ids(moe, spec.num_layers)) < spec.num_layers,
    }
    if reason := next((reason for reason, applies in reasons.items() if applies), None):
        raise CheckpointError(
            f"no Hugging Face architecture means the same as a {spec.family} model, whose norms "
            f"come after attention and FFN, with {reason}: FlexOlmo has routed experts with "
            "softmax scores in every layer.\n"
            "  build it without, or keep the checkpoint"
        )
    return "FlexOlmoForCausalLM"


def _of_sigmoid_scores(spec: ModelSpec, moe: Moe) -> Architecture:
    """Return the architecture with sigmoid scores and expert biases.

    Raises:
        CheckpointError: It does not have this model's layers.
    """
    layers = moe_layer_ids(moe, spec.num_layers)
    reason = ""
    if layers != tuple(range(spec.num_layers - len(layers), spec.num_layers)):
        reason = f"MoE layers {list(layers)}: in GLM-4-MoE only the first layers can be dense.\n"
    elif spec.attention_windows:
        reason = "attention windows: GLM-4-MoE has none.\n"
    if reason:
        raise CheckpointError(
            f"no Hugging Face architecture means the same as a {spec.family} model with "
            f"moe.moe_router_score_function (sigmoid) and {reason}"
            "  use moe.moe_router_score_function=softmax, or keep the checkpoint"
        )
    return "Glm4MoeForCausalLM"


def _factors(
    entry: _Entry, plan: ExpertPlan, spec: ModelSpec, *, half_open: bool
) -> tuple[float, ...]:
    """Return by what each tensor is multiplied to do in Hugging Face what it did in the run.

    Routed experts' outputs may be scaled at run time. A shared expert without a gate that becomes
    one of Qwen2-MoE passes a gate whose rows are zero: it is ``half_open``. Granite's multipliers
    become part of the weights: the residual stream of the export is the run's, divided by the
    multiplier of the embeddings.
    """
    by, role = spec.multipliers, entry.row.role
    added = by.residual / by.embedding
    match role:
        case "qkv" if by.attention is not None:
            return (by.attention * spec.kv_channels**0.5, 1.0, 1.0)
        case "proj" | "fc2":
            return (added,)
        case "expert_fc2":
            assert entry.layer is not None
            return (added * plan.layer(entry.layer).output_scale,)
        case "shared_fc2":
            return (added * (2.0 if half_open else 1.0),)
        case "final_norm":
            return (1 / by.logits,)
        case _:
            return (1.0,) * len(entry.names)


def _folded(tensor: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    return (tensor if factor == 1 else tensor * factor).to(dtype)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One global tensor (or one expert of it) and the Hugging Face tensors it becomes."""

    key: str | None
    """None for tensors of zeros that the architecture has and the run does not: the gate of a
    shared expert, a shared expert of no neurons, the biases of experts."""
    layer: int | None
    expert: int | None
    row: Row
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]


def _dtype_of(row: Row, weights: torch.dtype) -> torch.dtype:
    """Return the dtype in the folder: fp32 for biases of experts, as transformers keeps them."""
    return torch.float32 if row.role == "expert_bias" else weights


def _names(row: Row, architecture: Architecture | DenseArchitecture) -> tuple[str, ...]:
    """Return the Hugging Face names of a row; none if the architecture does not have it.

    In a dense architecture, the only expert is the FFN, and there is no router.
    """
    if architecture in MOE_NAMES and not row.scope.in_dense_model:
        return MOE_NAMES[architecture].get(row.role, ())
    return row.hf if row.scope.in_dense_model or row.scope is Scope.EXPERT else ()


def _entries(
    spec: ModelSpec, moe: Moe, architecture: Architecture | DenseArchitecture
) -> Iterator[_Entry]:
    routed = set(moe_layer_ids(moe, spec.num_layers))
    for row in ROWS:
        names, stored = _names(row, architecture), _exported(row, moe)
        if not has_row(row, spec) or not names:
            continue
        experts = range(moe.num_moe_experts) if row.scope is Scope.EXPERT else (None,)
        for layer in _layers(row.scope, routed, spec.num_layers):
            for expert in experts:
                yield _Entry(
                    key=checkpoint_key(row, layer=layer, moe_layer=layer in routed)
                    if stored
                    else None,
                    layer=layer,
                    expert=expert,
                    row=row,
                    names=tuple(name.format(layer=layer, expert=expert) for name in names),
                    shapes=_hf_shapes(row, spec, moe, architecture),
                )


def _exported(row: Row, moe: Moe) -> bool:
    """Return whether a row is part of an export.

    The noise of a noisy gate is not: after training, the plain gate routes alone.
    """
    if row.scope is Scope.GATE or (row.setting is not None and not getattr(moe, row.setting)):
        return False
    return row.scope is not Scope.SHARED or bool(moe.shared_size)


def _layers(scope: Scope, routed: Set[int], num_layers: int) -> Iterable[int | None]:
    """Return the ids of the layers in which rows of this scope exist; None for the model."""
    match scope:
        case Scope.MODEL:
            return (None,)
        case Scope.LAYER:
            return range(num_layers)
        case Scope.DENSE:
            return [layer for layer in range(num_layers) if layer not in routed]
        case _:
            return sorted(routed)


def _hf_shapes(
    row: Row, spec: ModelSpec, moe: Moe, architecture: Architecture | DenseArchitecture
) -> tuple[tuple[int, ...], ...]:
    size = moe.expert_size(spec.ffn_hidden_size)
    shared = exported_shared_size(spec, moe, architecture)
    return shapes_of(row, spec, E=moe.num_moe_experts, M=size, S=shared)


def _padded(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the tensor with zeros added to ``shape``: neurons of zeros add zero."""
    missing = [size - own for size, own in zip(shape, tensor.shape, strict=True)]
    if not any(missing):
        return tensor
    return torch.nn.functional.pad(tensor, [n for size in reversed(missing) for n in (0, size)])


def _cut(fused: Tensor, entry: _Entry, spec: ModelSpec) -> list[Tensor]:
    """A Megatron tensor as the Hugging Face tensors it fuses."""
    match entry.row.sharding:
        case Sharding.VOCABULARY:
            return [fused[: spec.vocab_size]]
        case Sharding.GATED:
            return list(fused.chunk(2))
        case Sharding.QKV:
            heads = spec.num_attention_heads // spec.num_query_groups
            sizes = [heads * spec.kv_channels, spec.kv_channels, spec.kv_channels]
            groups = fused.unflatten(0, (spec.num_query_groups, sum(sizes)))
            return [part.flatten(0, 1) for part in groups.split(sizes, dim=1)]
        case _:
            return [fused]
