"""From a checkpoint of any layout to a Hugging Face MoE folder, one tensor at a time.

The name table is read right to left: for every row of every layer, the global tensor is loaded from
the checkpoint (one expert of it where it has experts), cut into the tensors Hugging Face wants,
and written. There is no model, Megatron's or transformers', and never more than one expert or one
embedding in memory. Factors that a run applies to outputs are multiplied into the weights.

Shape letters of this module:

    D  hidden_size   M  neurons of one expert   E  num_moe_experts   V  vocab_size
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_moe.checkpoint import folder as folders
from megatron_moe.checkpoint.global_tensors import GlobalTensors
from megatron_moe.checkpoint.keys import checkpoint_key
from megatron_moe.config.run import Moe, RunConfig
from megatron_moe.errors import CheckpointError
from megatron_moe.experts.plan import ExpertPlan, moe_layer_ids
from megatron_moe.hf.dtypes import OF_PRECISION
from megatron_moe.hf.names import (
    GATE_ROLES,
    MOE_NAMES,
    MOE_ROLES,
    ROWS,
    Architecture,
    Row,
    Sharding,
    dense_shapes,
    has_row,
)
from megatron_moe.hf.spec import DenseSpec, read_spec
from megatron_moe.hf.writer import FolderWriter


def export_checkpoint(source: Path, out: Path) -> Architecture:
    """Write the model of a checkpoint as a Hugging Face folder.

    Args:
        source: A run folder (its newest checkpoint is taken) or a checkpoint folder.
        out: Folder to create: complete, or not there.

    Returns:
        The architecture that means the same as the trained model.

    Raises:
        CheckpointError: No checkpoint, no architecture that means the same, or ``out`` exists.
    """
    checkpoint = folders.find_checkpoint(source)
    config, spec = folders.read_config(checkpoint), read_spec(folders.source_copy(checkpoint))
    architecture = architecture_for(spec, config.moe)
    entries = list(_entries(spec, config.moe, architecture))
    dtype = OF_PRECISION[config.train.precision]
    announced = {
        name: (shape, dtype)
        for entry in entries
        for name, shape in zip(entry.names, entry.shapes, strict=True)
    }
    absent = _fixed_zeros(spec, config.moe, architecture)
    plan = folders.plan_of(checkpoint, spec, config)
    announced |= {name: (shape, dtype) for name, shape in absent.items()}
    with GlobalTensors(checkpoint) as tensors, FolderWriter(out, announced) as writer:
        for name, shape in absent.items():
            writer.write(name, torch.zeros(shape, dtype=dtype))
        for entry in entries:
            fused = tensors.read(entry.key, index=entry.expert, dtype=dtype)
            fused = _folded(fused, _output_factor(entry, plan))
            for name, tensor in zip(entry.names, _cut(fused, entry, spec), strict=True):
                writer.write(name, tensor)
        hf_config = moe_config(
            spec, config, architecture, folders.source_copy(checkpoint) / "config.json"
        )
        writer.add_file("config.json", (json.dumps(hf_config, indent=2) + "\n").encode())
        for file in sorted(folders.source_copy(checkpoint).iterdir()):
            if file.name != "config.json":
                writer.add_file(file.name, file)
    return architecture


def architecture_for(spec: DenseSpec, moe: Moe) -> Architecture:
    """The Hugging Face architecture that computes what the trained model computes.

    Raises:
        CheckpointError: There is none; says why.
    """
    if moe.router_gate == "noisy_mlp":
        raise CheckpointError(
            f"no Hugging Face architecture means the same as a {spec.family} model with "
            "moe.router_gate (noisy_mlp): all of them route by one linear layer.\n"
            "  use moe.router_gate=noisy_linear, or keep the checkpoint"
        )
    if moe.moe_router_score_function == "sigmoid":
        raise CheckpointError(
            f"no Hugging Face architecture means the same as a {spec.family} model with "
            "moe.moe_router_score_function (sigmoid): Mixtral, Qwen2-MoE and Qwen3-MoE take a "
            "softmax.\n  use moe.moe_router_score_function=softmax, or keep the checkpoint"
        )
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


def _output_factor(entry: _Entry, plan: ExpertPlan) -> float:
    """By what the tensor is multiplied to do in Hugging Face what it did in the run.

    Routed experts' outputs may be scaled at run time. Qwen2-MoE's shared expert passes a gate: its
    rows are zero, so it lets half of the output through.
    """
    if entry.row.role == "expert_fc2":
        assert entry.layer is not None
        return plan.layer(entry.layer).output_scale
    return 2.0 if entry.row.role == "shared_fc2" else 1.0


def _folded(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1.0 else (tensor.float() * factor).to(tensor.dtype)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One global tensor (or one expert of it) and the Hugging Face tensors it becomes."""

    key: str
    layer: int | None
    expert: int | None
    row: Row
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]


def _entries(spec: DenseSpec, moe: Moe, architecture: Architecture) -> Iterator[_Entry]:
    routed = set(moe_layer_ids(moe, spec.num_layers))
    for row in ROWS:
        # Noise is of training alone: what routes afterwards is the plain gate.
        if not has_row(row.role, spec) or row.role in GATE_ROLES or _has_no_neurons(row, moe):
            continue
        if "{layer}" not in row.megatron[0]:
            yield _entry(row, row.hf, spec, moe, layer=None, moe_layer=False)
            continue
        moe_role = row.role in MOE_ROLES
        names = MOE_NAMES[architecture][row.role] if moe_role else row.hf
        for layer in range(spec.num_layers):
            if moe_role and layer not in routed:
                continue
            if row.role in ("fc1", "fc2") and layer in routed:
                continue
            experts = range(moe.num_moe_experts) if row.role.startswith("expert") else (None,)
            for expert in experts:
                yield _entry(
                    row, names, spec, moe, layer=layer, moe_layer=layer in routed, expert=expert
                )


def _has_no_neurons(row: Row, moe: Moe) -> bool:
    return row.role.startswith("shared") and not moe.moe_shared_expert_intermediate_size


def _entry(
    row: Row,
    names: tuple[str, ...],
    spec: DenseSpec,
    moe: Moe,
    *,
    layer: int | None,
    moe_layer: bool,
    expert: int | None = None,
) -> _Entry:
    return _Entry(
        key=checkpoint_key(row, layer=layer, moe_layer=moe_layer),
        layer=layer,
        expert=expert,
        row=row,
        names=tuple(name.format(layer=layer, expert=expert) for name in names),
        shapes=_hf_shapes(row, spec, moe),
    )


def _hf_shapes(row: Row, spec: DenseSpec, moe: Moe) -> tuple[tuple[int, ...], ...]:
    hidden, size = spec.hidden_size, moe.moe_ffn_hidden_size or spec.ffn_hidden_size
    shared = moe.moe_shared_expert_intermediate_size or 0
    match row.role:
        case "router":
            return ((moe.num_moe_experts, hidden),)
        case "expert_fc1":
            return ((size, hidden), (size, hidden))
        case "expert_fc2":
            return ((hidden, size),)
        case "shared_fc1":
            return ((shared, hidden), (shared, hidden))
        case "shared_fc2":
            return ((hidden, shared),)
        case role:
            return dense_shapes(role, spec)


def _fixed_zeros(
    spec: DenseSpec, moe: Moe, architecture: Architecture
) -> dict[str, tuple[int, ...]]:
    """Tensors that Qwen2-MoE has and a run does not.

    The gate of the shared expert, and, where there is none, that expert itself: of no neurons, so
    it adds zero.
    """
    if architecture != "Qwen2MoeForCausalLM":
        return {}
    hidden = spec.hidden_size
    shapes = {
        "shared_expert_gate": (1, hidden),
    }
    if not moe.moe_shared_expert_intermediate_size:
        shapes |= {
            "shared_expert.gate_proj": (0, hidden),
            "shared_expert.up_proj": (0, hidden),
            "shared_expert.down_proj": (hidden, 0),
        }
    return {
        f"model.layers.{layer}.mlp.{name}.weight": shape
        for layer in moe_layer_ids(moe, spec.num_layers)
        for name, shape in shapes.items()
    }


def _cut(fused: Tensor, entry: _Entry, spec: DenseSpec) -> list[Tensor]:
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


def moe_config(
    spec: DenseSpec, config: RunConfig, architecture: Architecture, dense_config: Path
) -> dict[str, Any]:
    """``config.json`` of the exported model: the dense model's, with its experts."""
    moe = config.moe
    size = moe.moe_ffn_hidden_size or spec.ffn_hidden_size
    dense = json.loads(dense_config.read_text())
    kept = {key: value for key, value in dense.items() if key not in _DENSE_ONLY}
    common = {
        **kept,
        "architectures": [architecture],
        "head_dim": spec.kv_channels,
        "num_experts_per_tok": moe.moe_router_topk,
        "router_aux_loss_coef": moe.moe_aux_loss_coeff,
        "output_router_logits": False,
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[config.train.precision],
        "sliding_window": None,
    }
    if architecture == "MixtralForCausalLM":
        return {
            **common,
            "model_type": "mixtral",
            "intermediate_size": size,
            "num_local_experts": moe.num_moe_experts,
        }
    routed = set(moe_layer_ids(moe, spec.num_layers))
    qwen = {
        **common,
        "model_type": "qwen2_moe" if architecture.startswith("Qwen2") else "qwen3_moe",
        "num_experts": moe.num_moe_experts,
        "moe_intermediate_size": size,
        "norm_topk_prob": moe.router_order == "topk_softmax",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer in range(spec.num_layers) if layer not in routed],
        "use_sliding_window": False,
    }
    if architecture == "Qwen2MoeForCausalLM":
        # Qwen2-MoE always has a shared expert: one of no neurons adds exactly zero.
        shared = moe.moe_shared_expert_intermediate_size or 0
        qwen |= {"shared_expert_intermediate_size": shared, "qkv_bias": spec.qkv_bias}
    return qwen


_DENSE_ONLY = frozenset(
    {
        "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "mlp_bias",
        "pretraining_tp", "sliding_window", "use_sliding_window", "max_window_layers",
        "layer_types", "attention_bias",
    }
)  # fmt: skip
"""Keys that say what kind of dense model it was, or that the MoE's config sets itself."""
