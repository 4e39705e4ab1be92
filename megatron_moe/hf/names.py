"""Map Hugging Face tensors to Megatron-Core parameters and back: the only name table.

Upcycling reads it from Hugging Face to Megatron-Core, export in reverse, and both check against
it. A row says everything about one Megatron parameter: which Hugging Face tensors it consists of,
their shapes, in which layers it exists, and how tensor-parallel ranks shard it;
``parallel/shards.py`` turns a row into slices. Rows list the names of both layer specs:
torch-native (CPU) first, then Transformer Engine if it fuses a norm into the following linear
layer.

Hugging Face names are Llama's. A family that stores its tensors under other names, or several in
one, lists them in `families.FAMILIES`; `llama_tensors` finds Llama's in them when a folder is opened.

Templates contain ``{layer}`` (global in Hugging Face names, local to the pipeline chunk in
Megatron names) and ``{expert}`` (global in Hugging Face names, local to the ep rank in Megatron
names). Shapes are words of one letter per dimension:

    V  vocab_size     Q  query heads * head width   F  neurons of the dense FFN
    D  hidden_size    G  key heads * head width     M  neurons of one expert
    E  experts        C  width of one head          S  neurons of the shared expert
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

from megatron_moe.config.run import Role
from megatron_moe.hf.families import FAMILIES
from megatron_moe.hf.spec import DenseSpec

if TYPE_CHECKING:  # the planner reads this table, and starts without torch
    from megatron_moe.hf.header import TensorInfo


class Sharding(Enum):
    """Sharding of one parameter over the ranks of a tensor-parallel group."""

    WHOLE = "every rank holds all of it"
    VOCABULARY = "rows, after padding the vocabulary to equal parts"
    QKV = "whole query groups: their query heads, then key, then value"
    GATED = "rows of gate, then the same rows of up"
    COLUMNS = "columns"


class Scope(Enum):
    """Part of the model in which a parameter exists."""

    MODEL = "once, outside of the layers"
    LAYER = "in every layer"
    DENSE = "in layers with a dense FFN"
    MOE = "in MoE layers"
    EXPERT = "in MoE layers, once per expert"
    SHARED = "in MoE layers with a shared expert"
    GATE = "in MoE layers during training alone: no Hugging Face architecture has it"

    @property
    def in_dense_model(self) -> bool:
        """Whether a dense model has the parameter."""
        return self in (Scope.MODEL, Scope.LAYER, Scope.DENSE)


@dataclass(frozen=True, slots=True)
class Row:
    """One Megatron parameter and the Hugging Face tensors it consists of."""

    role: str
    scope: Scope
    megatron: tuple[str, ...]
    hf: tuple[str, ...]
    """Tensors of the dense model that it is filled from; none if it is drawn or measured."""
    shapes: str
    """Shapes of the Hugging Face tensors, a word each."""
    sharding: Sharding
    requires: Literal["qkv_bias", "qk_layernorm", "separate_output"] | None = None
    """Property of the `DenseSpec` without which a model does not have the parameter."""


_L = "decoder.layers.{layer}."
_H = "model.layers.{layer}."
_GATE_UP = (_H + "mlp.gate_proj.weight", _H + "mlp.up_proj.weight")
_DOWN = (_H + "mlp.down_proj.weight",)

# fmt: off
ROWS: tuple[Row, ...] = (
    Row("embedding",   Scope.MODEL, ("embedding.word_embeddings.weight",),
                       ("model.embed_tokens.weight",),                   "VD",       Sharding.VOCABULARY),
    Row("input_norm",  Scope.LAYER, (_L + "input_layernorm.weight", _L + "self_attention.linear_qkv.layer_norm_weight"),
                       (_H + "input_layernorm.weight",),                 "D",        Sharding.WHOLE),
    Row("qkv",         Scope.LAYER, (_L + "self_attention.linear_qkv.weight",),
                       (_H + "self_attn.q_proj.weight", _H + "self_attn.k_proj.weight", _H + "self_attn.v_proj.weight"),
                                                                         "QD GD GD", Sharding.QKV),
    Row("qkv_bias",    Scope.LAYER, (_L + "self_attention.linear_qkv.bias",),
                       (_H + "self_attn.q_proj.bias", _H + "self_attn.k_proj.bias", _H + "self_attn.v_proj.bias"),
                                                                         "Q G G",    Sharding.QKV, "qkv_bias"),
    Row("q_norm",      Scope.LAYER, (_L + "self_attention.q_layernorm.weight",),
                       (_H + "self_attn.q_norm.weight",),                "C",        Sharding.WHOLE, "qk_layernorm"),
    Row("k_norm",      Scope.LAYER, (_L + "self_attention.k_layernorm.weight",),
                       (_H + "self_attn.k_norm.weight",),                "C",        Sharding.WHOLE, "qk_layernorm"),
    Row("proj",        Scope.LAYER, (_L + "self_attention.linear_proj.weight",),
                       (_H + "self_attn.o_proj.weight",),                "DQ",       Sharding.COLUMNS),
    Row("ffn_norm",    Scope.LAYER, (_L + "pre_mlp_layernorm.weight", _L + "mlp.linear_fc1.layer_norm_weight"),
                       (_H + "post_attention_layernorm.weight",),        "D",        Sharding.WHOLE),
    Row("fc1",         Scope.DENSE, (_L + "mlp.linear_fc1.weight",),     _GATE_UP,   "FD FD", Sharding.GATED),
    Row("fc2",         Scope.DENSE, (_L + "mlp.linear_fc2.weight",),     _DOWN,      "DF",    Sharding.COLUMNS),
    Row("router",      Scope.MOE,   (_L + "mlp.router.weight",),         (),         "ED",    Sharding.WHOLE),
    Row("router_noise",  Scope.GATE, (_L + "mlp.router.noise_weight",),  (),         "",      Sharding.WHOLE),
    Row("router_output", Scope.GATE, (_L + "mlp.router.output_weight",), (),         "",      Sharding.WHOLE),
    Row("expert_fc1",  Scope.EXPERT, (_L + "mlp.experts.local_experts.{expert}.linear_fc1.weight", _L + "mlp.experts.linear_fc1.weight{expert}"),
                       _GATE_UP,                                         "MD MD",    Sharding.GATED),
    Row("expert_fc2",  Scope.EXPERT, (_L + "mlp.experts.local_experts.{expert}.linear_fc2.weight", _L + "mlp.experts.linear_fc2.weight{expert}"),
                       _DOWN,                                            "DM",       Sharding.COLUMNS),
    Row("shared_fc1",  Scope.SHARED, (_L + "mlp.shared_experts.linear_fc1.weight",), _GATE_UP, "SD SD", Sharding.GATED),
    Row("shared_fc2",  Scope.SHARED, (_L + "mlp.shared_experts.linear_fc2.weight",), _DOWN,    "DS",    Sharding.COLUMNS),
    Row("final_norm",  Scope.MODEL, ("decoder.final_layernorm.weight",),
                       ("model.norm.weight",),                           "D",        Sharding.WHOLE),
    Row("output",      Scope.MODEL, ("output_layer.weight",),
                       ("lm_head.weight",),                              "VD",       Sharding.VOCABULARY, "separate_output"),
)

Architecture = Literal["MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"]

_QWEN_MOE = {
    "router":     (_H + "mlp.gate.weight",),
    "expert_fc1": (_H + "mlp.experts.{expert}.gate_proj.weight", _H + "mlp.experts.{expert}.up_proj.weight"),
    "expert_fc2": (_H + "mlp.experts.{expert}.down_proj.weight",),
}
MOE_NAMES: dict[Architecture, dict[str, tuple[str, ...]]] = {
    "MixtralForCausalLM": {
        "router":     (_H + "block_sparse_moe.gate.weight",),
        "expert_fc1": (_H + "block_sparse_moe.experts.{expert}.w1.weight", _H + "block_sparse_moe.experts.{expert}.w3.weight"),
        "expert_fc2": (_H + "block_sparse_moe.experts.{expert}.w2.weight",),
    },
    "Qwen2MoeForCausalLM": {
        **_QWEN_MOE,
        "shared_fc1": (_H + "mlp.shared_expert.gate_proj.weight", _H + "mlp.shared_expert.up_proj.weight"),
        "shared_fc2": (_H + "mlp.shared_expert.down_proj.weight",),
    },
    "Qwen3MoeForCausalLM": _QWEN_MOE,
}
"""Hugging Face names of the MoE layers' rows in each architecture; other rows keep their names."""
# fmt: on

ROW_OF_ROLE = {row.role: row for row in ROWS}

ROLES: dict[Role, tuple[str, ...]] = {
    "router": ("router", "router_noise", "router_output"),
    "experts": ("expert_fc1", "expert_fc2"),
    "shared_experts": ("shared_fc1", "shared_fc2"),
    "dense_ffn": ("fc1", "fc2"),
    "attention": ("qkv", "qkv_bias", "proj"),
    "norms": ("input_norm", "q_norm", "k_norm", "ffn_norm", "final_norm"),
    "embeddings": ("embedding", "output"),
}
"""Rows of each role that settings name (train.freeze, optimizer.lr_multipliers)."""
_ROLE_OF_ROW: dict[str, Role] = {row: role for role, rows in ROLES.items() for row in rows}


@dataclass(frozen=True, slots=True)
class Match:
    """A parsed Megatron parameter name: its row, and the layer and expert of this rank."""

    row: Row
    layer: int | None
    expert: int | None


def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.escape(template)
    for field in ("layer", "expert"):
        escaped = escaped.replace(rf"\{{{field}\}}", rf"(?P<{field}>\d+)")
    return re.compile(escaped)


_PATTERNS = [(_pattern(template), row) for row in ROWS for template in row.megatron]


def match(parameter: str) -> Match | None:
    """Parse ``parameter``, a Megatron-Core name; return None if it matches no row.

    >>> result = match("decoder.layers.3.mlp.experts.linear_fc1.weight12")
    >>> result.row.role, result.layer, result.expert
    ('expert_fc1', 3, 12)
    """
    for pattern, row in _PATTERNS:
        if parsed := pattern.fullmatch(parameter):
            groups = {key: int(value) for key, value in parsed.groupdict().items()}
            return Match(row, groups.get("layer"), groups.get("expert"))
    return None


def parameter_role(parameter: str) -> Role:
    """Return the role of ``parameter``, a Megatron-Core name, in settings.

    >>> parameter_role("decoder.layers.3.mlp.experts.linear_fc1.weight12")
    'experts'
    """
    parsed = match(parameter)
    assert parsed is not None, f"{parameter} has no row"
    return _ROLE_OF_ROW[parsed.row.role]


def dense_tensors(spec: DenseSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield Llama's name and the shape of every tensor of a dense model of this shape."""
    for row in ROWS:
        if not row.scope.in_dense_model or not has_row(row, spec):
            continue
        for layer in (0,) if row.scope is Scope.MODEL else range(spec.num_layers):
            for template, shape in zip(row.hf, shapes_of(row, spec), strict=True):
                yield template.format(layer=layer), shape


def llama_tensors(files: Mapping[str, TensorInfo], spec: DenseSpec) -> dict[str, TensorInfo]:
    """Find Llama's tensors in a family's folder; a stacked tensor is taken apart by rows.

    Tensors that the family does not rename keep their names. So do those of an unexpected shape:
    `check_tensors` reports them.
    """
    shapes, tensors = dict(dense_tensors(spec)), dict(files)
    for template, parts in FAMILIES[spec.family].tensors.items():
        for layer in range(spec.num_layers):
            names = [part.format(layer=layer) for part in parts]
            rows = [shapes[name][0] for name in names]
            stacked = files.get(name := template.format(layer=layer))
            if stacked is None or stacked.shape != (sum(rows), *shapes[names[0]][1:]):
                continue
            del tensors[name]
            for part, offset in zip(names, accumulate(rows, initial=0), strict=False):
                tensors[part] = stacked.rows(offset, shapes[part][0])
    return tensors


def ffn_names(layer: int) -> tuple[str, str, str]:
    """Return Llama's names of gate, up and down of a dense layer."""
    gate, up, down = (name.format(layer=layer) for name in (*_GATE_UP, *_DOWN))
    return gate, up, down


def has_row(row: Row, spec: DenseSpec) -> bool:
    """Return whether a model of this shape has the row."""
    return row.requires is None or getattr(spec, row.requires)


def shapes_of(row: Row, spec: DenseSpec, **experts: int) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of the row's Hugging Face tensors.

    Args:
        row: A row of the table.
        spec: Shape of the dense model.
        experts: The sizes E, M and S of the MoE layers, for their rows.

    >>> ROW_OF_ROLE["expert_fc1"].shapes
    'MD MD'
    """
    head = spec.kv_channels
    sizes = {
        "V": spec.vocab_size,
        "D": spec.hidden_size,
        "Q": spec.num_attention_heads * head,
        "G": spec.num_query_groups * head,
        "C": head,
        "F": spec.ffn_hidden_size,
        **experts,
    }
    return tuple(tuple(sizes[letter] for letter in word) for word in row.shapes.split())
