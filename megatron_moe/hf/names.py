"""Map Hugging Face tensors to Megatron-Core parameters and back: the only name table.

Upcycling reads it from Hugging Face to Megatron-Core, export in reverse, and both check against
it. A row says everything about one Megatron parameter: which Hugging Face tensors it consists of,
their shapes, in which layers it exists, and how tensor-parallel ranks shard it;
``parallel/shards.py`` turns a row into slices. Rows list the names of both layer specs:
torch-native (CPU) first, then Transformer Engine if it fuses a norm into the following linear
layer.

Hugging Face names are Llama's, and those of Qwen2-MoE for experts (`MOE_TENSORS`). A family that
stores its tensors under other names, or several in one, lists them in `families.FAMILIES` and
`MOE_NAMES`; `llama_tensors` finds Llama's in them when a folder is opened.

Templates contain ``{layer}`` (global in Hugging Face names, local to the pipeline chunk in
Megatron names) and ``{expert}`` (global in Hugging Face names, local to the ep rank in Megatron
names). Shapes are words of one letter per dimension:

    V  vocab_size     Q  query heads * head width   F  neurons of the dense FFN
    D  hidden_size    G  key heads * head width     M  neurons of one expert
    E  experts        C  width of one head          S  neurons of the shared expert
    1  one            A  width of the norm of q     B  width of the norm of k
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Literal, cast

from megatron_moe.config.parts import Part, Role
from megatron_moe.hf.families import FAMILIES
from megatron_moe.hf.spec import ModelSpec

if TYPE_CHECKING:  # the planner reads this table, and starts without torch
    from megatron_moe.hf.header import TensorInfo


class Sharding(Enum):
    """Sharding of one parameter over the ranks of a tensor-parallel group."""

    WHOLE = "every rank holds all of it"
    VOCABULARY = "rows, after padding the vocabulary to equal parts"
    QKV = "whole query groups: their query heads, then key, then value"
    GATED = "rows of gate, then the same rows of up"
    COLUMNS = "columns"
    QK_NORM = "every rank holds all of it, or its heads' part if the norm spans all heads"


class Scope(Enum):
    """Part of the model in which a parameter exists."""

    MODEL = "once, outside of the layers"
    LAYER = "in every layer"
    DENSE = "in layers with a dense FFN"
    MOE = "in MoE layers"
    EXPERT = "in MoE layers, once per expert"
    SHARED = "in MoE layers with a shared expert"
    GATE = "in MoE layers during training alone: no Hugging Face architecture has it"
    ADAPTER = "beside a weight with an adapter, to which export adds it"

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
    """Tensors of a dense model that it is filled from; none if it is drawn or measured. A MoE model
    has `MOE_TENSORS`."""
    shapes: str
    """Shapes of the Hugging Face tensors, a word each."""
    sharding: Sharding
    requires: (
        Literal["qkv_bias", "qk_layernorm", "separate_output", "pre_norms", "post_norms"] | None
    ) = None
    """Property of the `ModelSpec` without which a model does not have the parameter."""
    setting: Literal["moe_router_enable_expert_bias", "moe_shared_expert_gate"] | None = None
    """Setting of ``moe`` without which a MoE layer does not have the parameter."""


_L = "decoder.layers.{layer}."
_E = _L + "mlp.experts.local_experts.{expert}."
_H = "model.layers.{layer}."
_GATE_UP = (_H + "mlp.gate_proj.weight", _H + "mlp.up_proj.weight")
_DOWN = (_H + "mlp.down_proj.weight",)

# fmt: off
ROWS: tuple[Row, ...] = (
    Row("embedding",   Scope.MODEL, ("embedding.word_embeddings.weight",),
                       ("model.embed_tokens.weight",),                   "VD",       Sharding.VOCABULARY),
    Row("input_norm",  Scope.LAYER, (_L + "input_layernorm.weight", _L + "self_attention.linear_qkv.layer_norm_weight"),
                       (_H + "input_layernorm.weight",),                 "D",        Sharding.WHOLE, "pre_norms"),
    Row("qkv",         Scope.LAYER, (_L + "self_attention.linear_qkv.weight",),
                       (_H + "self_attn.q_proj.weight", _H + "self_attn.k_proj.weight", _H + "self_attn.v_proj.weight"),
                                                                         "QD GD GD", Sharding.QKV),
    Row("qkv_bias",    Scope.LAYER, (_L + "self_attention.linear_qkv.bias",),
                       (_H + "self_attn.q_proj.bias", _H + "self_attn.k_proj.bias", _H + "self_attn.v_proj.bias"),
                                                                         "Q G G",    Sharding.QKV, "qkv_bias"),
    Row("q_norm",      Scope.LAYER, (_L + "self_attention.q_layernorm.weight",),
                       (_H + "self_attn.q_norm.weight",),                "A",        Sharding.QK_NORM, "qk_layernorm"),
    Row("k_norm",      Scope.LAYER, (_L + "self_attention.k_layernorm.weight",),
                       (_H + "self_attn.k_norm.weight",),                "B",        Sharding.QK_NORM, "qk_layernorm"),
    Row("proj",        Scope.LAYER, (_L + "self_attention.linear_proj.weight",),
                       (_H + "self_attn.o_proj.weight",),                "DQ",       Sharding.COLUMNS),
    Row("ffn_norm",    Scope.LAYER, (_L + "pre_mlp_layernorm.weight", _L + "mlp.linear_fc1.layer_norm_weight"),
                       (_H + "post_attention_layernorm.weight",),        "D",        Sharding.WHOLE, "pre_norms"),
    Row("attention_output_norm", Scope.LAYER, (_L + "self_attn_bda.norm.weight",),
                       (_H + "post_attention_layernorm.weight",),        "D",        Sharding.WHOLE, "post_norms"),
    Row("ffn_output_norm", Scope.LAYER, (_L + "mlp_bda.norm.weight",),
                       (_H + "post_feedforward_layernorm.weight",),      "D",        Sharding.WHOLE, "post_norms"),
    Row("fc1",         Scope.DENSE, (_L + "mlp.linear_fc1.weight",),     _GATE_UP,   "FD FD", Sharding.GATED),
    Row("fc2",         Scope.DENSE, (_L + "mlp.linear_fc2.weight",),     _DOWN,      "DF",    Sharding.COLUMNS),
    Row("router",      Scope.MOE,   (_L + "mlp.router.weight",),         (),         "ED",    Sharding.WHOLE),
    Row("expert_bias", Scope.MOE,   (_L + "mlp.router.expert_bias",),    (),         "E",     Sharding.WHOLE,
                       setting="moe_router_enable_expert_bias"),
    Row("router_noise",  Scope.GATE, (_L + "mlp.router.noise_weight",),  (),         "",      Sharding.WHOLE),
    Row("router_output", Scope.GATE, (_L + "mlp.router.output_weight",), (),         "",      Sharding.WHOLE),
    Row("expert_fc1",  Scope.EXPERT, (_L + "mlp.experts.local_experts.{expert}.linear_fc1.weight", _L + "mlp.experts.linear_fc1.weight{expert}"),
                       _GATE_UP,                                         "MD MD",    Sharding.GATED),
    Row("expert_fc2",  Scope.EXPERT, (_L + "mlp.experts.local_experts.{expert}.linear_fc2.weight", _L + "mlp.experts.linear_fc2.weight{expert}"),
                       _DOWN,                                            "DM",       Sharding.COLUMNS),
    Row("shared_fc1",  Scope.SHARED, (_L + "mlp.shared_experts.linear_fc1.weight",), _GATE_UP, "SD SD", Sharding.GATED),
    Row("shared_fc2",  Scope.SHARED, (_L + "mlp.shared_experts.linear_fc2.weight",), _DOWN,    "DS",    Sharding.COLUMNS),
    Row("shared_gate", Scope.SHARED, (_L + "mlp.shared_experts.gate_weight",), (),         "1D",    Sharding.WHOLE,
                       setting="moe_shared_expert_gate"),
    Row("qkv_in",      Scope.ADAPTER, (_L + "self_attention.linear_qkv.adapter.linear_in.weight",),   (), "", Sharding.WHOLE),
    Row("qkv_out",     Scope.ADAPTER, (_L + "self_attention.linear_qkv.adapter.linear_out.weight",),  (), "", Sharding.QKV),
    Row("proj_in",     Scope.ADAPTER, (_L + "self_attention.linear_proj.adapter.linear_in.weight",),  (), "", Sharding.COLUMNS),
    Row("proj_out",    Scope.ADAPTER, (_L + "self_attention.linear_proj.adapter.linear_out.weight",), (), "", Sharding.WHOLE),
    Row("expert_fc1_in",  Scope.ADAPTER, (_E + "linear_fc1.adapter.linear_in.weight",),  (), "", Sharding.WHOLE),
    Row("expert_fc1_out", Scope.ADAPTER, (_E + "linear_fc1.adapter.linear_out.weight",), (), "", Sharding.WHOLE),
    Row("expert_fc2_in",  Scope.ADAPTER, (_E + "linear_fc2.adapter.linear_in.weight",),  (), "", Sharding.WHOLE),
    Row("expert_fc2_out", Scope.ADAPTER, (_E + "linear_fc2.adapter.linear_out.weight",), (), "", Sharding.WHOLE),
    Row("final_norm",  Scope.MODEL, ("decoder.final_layernorm.weight",),
                       ("model.norm.weight",),                           "D",        Sharding.WHOLE),
    Row("output",      Scope.MODEL, ("output_layer.weight",),
                       ("lm_head.weight",),                              "VD",       Sharding.VOCABULARY, "separate_output"),
)

Architecture = Literal[
    "MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM", "FlexOlmoForCausalLM",
    "Glm4MoeForCausalLM",
]

_ROUTED = {
    "router":     (_H + "mlp.gate.weight",),
    "expert_fc1": (_H + "mlp.experts.{expert}.gate_proj.weight", _H + "mlp.experts.{expert}.up_proj.weight"),
    "expert_fc2": (_H + "mlp.experts.{expert}.down_proj.weight",),
}
_SHARED = {
    "shared_fc1": (_H + "mlp.shared_expert.gate_proj.weight", _H + "mlp.shared_expert.up_proj.weight"),
    "shared_fc2": (_H + "mlp.shared_expert.down_proj.weight",),
}
_SHARED_GATE = {"shared_gate": (_H + "mlp.shared_expert_gate.weight",)}
_EXPERT_BIAS = {"expert_bias": (_H + "mlp.gate.e_score_correction_bias",)}
MOE_TENSORS: dict[str, tuple[str, ...]] = _ROUTED | _SHARED | _SHARED_GATE | _EXPERT_BIAS
"""Names under which the tensors of MoE layers are read, whatever the architecture calls them."""

MOE_NAMES: dict[Architecture, dict[str, tuple[str, ...]]] = {
    "MixtralForCausalLM": {
        "router":     (_H + "block_sparse_moe.gate.weight",),
        "expert_fc1": (_H + "block_sparse_moe.experts.{expert}.w1.weight", _H + "block_sparse_moe.experts.{expert}.w3.weight"),
        "expert_fc2": (_H + "block_sparse_moe.experts.{expert}.w2.weight",),
    },
    "Qwen2MoeForCausalLM": _ROUTED | _SHARED | _SHARED_GATE,
    "Qwen3MoeForCausalLM": _ROUTED,
    "OlmoeForCausalLM": _ROUTED,
    "FlexOlmoForCausalLM": _ROUTED,
    "Glm4MoeForCausalLM": {
        **_ROUTED, **_EXPERT_BIAS,
        "shared_fc1": (_H + "mlp.shared_experts.gate_proj.weight", _H + "mlp.shared_experts.up_proj.weight"),
        "shared_fc2": (_H + "mlp.shared_experts.down_proj.weight",),
    },
}
"""Hugging Face names of the MoE layers' rows in each architecture; other rows keep their names."""

_STACKED = {
    "expert_fc1": _H + "mlp.experts.gate_up_proj",
    "expert_fc2": _H + "mlp.experts.down_proj",
}
"""Tensors that hold all experts of a layer, as transformers 5 may save them: ``(E, 2M, D)`` with
gate before up, and ``(E, D, M)``."""
# fmt: on

ROW_OF_ROLE = {row.role: row for row in ROWS}

ROLES: dict[Role, tuple[str, ...]] = {
    "router": ("router", "expert_bias", "router_noise", "router_output"),
    "experts": ("expert_fc1", "expert_fc2"),
    "shared_experts": ("shared_fc1", "shared_fc2", "shared_gate"),
    "dense_ffn": ("fc1", "fc2"),
    "attention": ("qkv", "qkv_bias", "proj"),
    "norms": (
        "input_norm",
        "q_norm",
        "k_norm",
        "ffn_norm",
        "attention_output_norm",
        "ffn_output_norm",
        "final_norm",
    ),
    "embeddings": ("embedding", "output"),
    "adapters": tuple(row.role for row in ROWS if row.scope is Scope.ADAPTER),
}
"""Rows of each role that settings name (train.freeze, optimizer.lr_multipliers)."""
ADAPTERS = {row: (f"{row}_in", f"{row}_out") for row in ("qkv", "proj", "expert_fc1", "expert_fc2")}
"""Rows of the adapter of each row that can have one: A, ``(R, inputs)``, and B, ``(outputs, R)``."""
_ROLE_OF_ROW: dict[str, Role] = {row: role for role, rows in ROLES.items() for row in rows}


def role_of(row: Row) -> Role:
    """Return the role of a row in settings."""
    return _ROLE_OF_ROW[row.role]


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


@lru_cache(maxsize=2**16)
def parameter_part(parameter: str) -> Part:
    """Return the role of ``parameter``, a Megatron-Core name, in settings, and its layer.

    >>> parameter_part("decoder.layers.3.mlp.experts.linear_fc1.weight12")
    Part(role='experts', layer=3)
    """
    parsed = match(parameter)
    assert parsed is not None, f"{parameter} has no row"
    return Part(_ROLE_OF_ROW[parsed.row.role], parsed.layer)


def dense_tensors(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and the shape of every tensor of a source model of this shape."""
    routed = frozenset(spec.experts.moe_layers if spec.experts is not None else ())
    for row in ROWS:
        layers = [layer for layer in _layers(row, spec) if in_source(row, spec, layer)]
        shapes = shapes_of(row, spec, **source_sizes(spec)) if layers else ()
        experts = range(source_sizes(spec).get("E", 0)) if row.scope is Scope.EXPERT else (None,)
        for layer in layers:
            for template, shape in zip(source_names(row, layer in routed), shapes, strict=True):
                for expert in experts:
                    yield template.format(layer=layer, expert=expert), shape


def _layers(row: Row, spec: ModelSpec) -> Iterable[int]:
    return (0,) if row.scope is Scope.MODEL else range(spec.num_layers)


def in_source(row: Row, spec: ModelSpec, layer: int) -> bool:
    """Return whether layer ``layer`` of a source model of this shape has the row."""
    experts = spec.experts
    routed = experts is not None and layer in experts.moe_layers
    if not has_row(row, spec):
        return False
    match row.scope:
        case Scope.MODEL | Scope.LAYER:
            return True
        case Scope.DENSE:
            return not routed
        case Scope.GATE | Scope.ADAPTER:
            return False
        case Scope.SHARED if experts is None or not experts.shared_size:
            return False
        case _:
            return routed and (row.setting is None or bool(getattr(experts, row.setting)))


def source_names(row: Row, routed: bool) -> tuple[str, ...]:
    """Return the templates of the tensors that a row is filled from.

    Args:
        row: A row of the table.
        routed: Whether the layer has experts in the source model.
    """
    return MOE_TENSORS[row.role] if routed and row.role in MOE_TENSORS else row.hf


def source_sizes(spec: ModelSpec) -> dict[str, int]:
    """Return the sizes of the tensors that experts are filled from, for `shapes_of`.

    Those of a MoE source, or the size of the dense FFN, in which each expert chooses neurons.
    """
    if spec.experts is None:
        return {"M": spec.ffn_hidden_size, "S": spec.ffn_hidden_size}
    experts = spec.experts
    return {
        "E": experts.num_moe_experts,
        "M": experts.moe_ffn_hidden_size,
        "S": experts.shared_size,
    }


def llama_tensors(files: Mapping[str, TensorInfo], spec: ModelSpec) -> dict[str, TensorInfo]:
    """Find Llama's tensors in a family's folder, and those of `MOE_TENSORS` for experts.

    A stacked tensor is taken apart by rows, or by experts. Tensors that the family does not rename
    keep their names. So do those of an unexpected shape: `check_tensors` reports them.
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
    return tensors if spec.experts is None else _moe_tensors(tensors, spec)


def _moe_tensors(files: dict[str, TensorInfo], spec: ModelSpec) -> dict[str, TensorInfo]:
    experts = spec.experts
    assert experts is not None
    tensors = dict(files)
    names = MOE_NAMES[cast("Architecture", FAMILIES[spec.family].architecture)]
    for layer in experts.moe_layers:
        for role, template in _STACKED.items():
            stacked = files.get(name := template.format(layer=layer))
            if stacked is not None and stacked.shape == _stacked_shape(role, spec):
                del tensors[name]
                tensors |= _unstacked(stacked, role, layer)
        for role, templates in names.items():
            numbers = range(experts.num_moe_experts if _is_routed(role) else 1)
            for old, new in zip(templates, MOE_TENSORS[role], strict=True):
                for expert in numbers:
                    info = tensors.pop(old.format(layer=layer, expert=expert), None)
                    # A shared expert without neurons adds zero, whatever its gate is.
                    if info is not None and (experts.shared_size or not _is_shared(role)):
                        tensors[new.format(layer=layer, expert=expert)] = info
    return tensors


def _is_routed(role: str) -> bool:
    return ROW_OF_ROLE[role].scope is Scope.EXPERT


def _is_shared(role: str) -> bool:
    return ROW_OF_ROLE[role].scope is Scope.SHARED


def _stacked_shape(role: str, spec: ModelSpec) -> tuple[int, ...]:
    shapes = shapes_of(ROW_OF_ROLE[role], spec, **source_sizes(spec))
    return (source_sizes(spec)["E"], sum(shape[0] for shape in shapes), *shapes[0][1:])


def _unstacked(stacked: TensorInfo, role: str, layer: int) -> dict[str, TensorInfo]:
    """Return each expert's tensors in a tensor that stacks all of a layer, by name."""
    tensors, names = {}, MOE_TENSORS[role]
    for expert in range(stacked.shape[0]):
        fused = stacked.at(expert)
        rows = fused.shape[0] // len(names)
        for part, name in enumerate(names):
            tensors[name.format(layer=layer, expert=expert)] = fused.rows(part * rows, rows)
    return tensors


def ffn_names(layer: int) -> tuple[str, str, str]:
    """Return Llama's names of gate, up and down of a dense layer."""
    gate, up, down = (name.format(layer=layer) for name in (*_GATE_UP, *_DOWN))
    return gate, up, down


def expert_names(layer: int, expert: int) -> tuple[str, str, str]:
    """Return the names of gate, up and down of an expert of a MoE source."""
    templates = (*MOE_TENSORS["expert_fc1"], *MOE_TENSORS["expert_fc2"])
    gate, up, down = (name.format(layer=layer, expert=expert) for name in templates)
    return gate, up, down


def has_row(row: Row, spec: ModelSpec) -> bool:
    """Return whether a model of this shape has the row."""
    return row.requires is None or getattr(spec, row.requires)


def shapes_of(row: Row, spec: ModelSpec, **experts: int) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of the row's Hugging Face tensors.

    Args:
        row: A row of the table.
        spec: Shape of the source model.
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
        "A": spec.num_attention_heads * head if spec.qk_norm_spans_heads else head,
        "B": spec.num_query_groups * head if spec.qk_norm_spans_heads else head,
        "1": 1,
        "F": spec.ffn_hidden_size,
        **experts,
    }
    return tuple(tuple(sizes[letter] for letter in word) for word in row.shapes.split())
