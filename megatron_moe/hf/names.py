"""THE name table: Hugging Face tensors <-> Megatron-Core parameters.

Read left to right by upcycling, right to left by export, and by the checks of both. A row says what
one Megatron parameter is made of and how tensor-parallel ranks share it; ``parallel/shards.py``
turns a row into slices. Names of both layer specs stand side by side: torch-native (CPU) first,
Transformer Engine second where it fuses a norm into the linear layer behind it.

Templates hold ``{layer}`` (global on the Hugging Face side, local to the pipeline chunk on
Megatron's) and ``{expert}`` (global there, local to the ep rank here).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from megatron_moe.hf.spec import DenseSpec


class Sharding(Enum):
    """How the ranks of a tensor-parallel group share one parameter."""

    WHOLE = "every rank holds all of it"
    VOCABULARY = "rows, after padding the vocabulary to equal parts"
    QKV = "whole query groups: their query heads, then key, then value"
    GATED = "rows of gate, then the same rows of up"
    COLUMNS = "columns"


@dataclass(frozen=True, slots=True)
class Row:
    """One Megatron parameter and the Hugging Face tensors it is made of."""

    role: str
    megatron: tuple[str, ...]
    hf: tuple[str, ...]
    sharding: Sharding


_L = "decoder.layers.{layer}."
_H = "model.layers.{layer}."

# fmt: off
ROWS: tuple[Row, ...] = (
    Row("embedding",   ("embedding.word_embeddings.weight",),
                       ("model.embed_tokens.weight",),                          Sharding.VOCABULARY),
    Row("input_norm",  (_L + "input_layernorm.weight", _L + "self_attention.linear_qkv.layer_norm_weight"),
                       (_H + "input_layernorm.weight",),                        Sharding.WHOLE),
    Row("qkv",         (_L + "self_attention.linear_qkv.weight",),
                       (_H + "self_attn.q_proj.weight", _H + "self_attn.k_proj.weight", _H + "self_attn.v_proj.weight"), Sharding.QKV),
    Row("qkv_bias",    (_L + "self_attention.linear_qkv.bias",),
                       (_H + "self_attn.q_proj.bias", _H + "self_attn.k_proj.bias", _H + "self_attn.v_proj.bias"),       Sharding.QKV),
    Row("q_norm",      (_L + "self_attention.q_layernorm.weight",),
                       (_H + "self_attn.q_norm.weight",),                       Sharding.WHOLE),
    Row("k_norm",      (_L + "self_attention.k_layernorm.weight",),
                       (_H + "self_attn.k_norm.weight",),                       Sharding.WHOLE),
    Row("proj",        (_L + "self_attention.linear_proj.weight",),
                       (_H + "self_attn.o_proj.weight",),                       Sharding.COLUMNS),
    Row("ffn_norm",    (_L + "pre_mlp_layernorm.weight", _L + "mlp.linear_fc1.layer_norm_weight"),
                       (_H + "post_attention_layernorm.weight",),               Sharding.WHOLE),
    Row("fc1",         (_L + "mlp.linear_fc1.weight",),
                       (_H + "mlp.gate_proj.weight", _H + "mlp.up_proj.weight"), Sharding.GATED),
    Row("fc2",         (_L + "mlp.linear_fc2.weight",),
                       (_H + "mlp.down_proj.weight",),                          Sharding.COLUMNS),
    Row("router",      (_L + "mlp.router.weight",),
                       (),                                                      Sharding.WHOLE),
    Row("router_noise", (_L + "mlp.router.noise_weight",),
                       (),                                                      Sharding.WHOLE),
    Row("router_output", (_L + "mlp.router.output_weight",),
                       (),                                                      Sharding.WHOLE),
    Row("expert_fc1",  (_L + "mlp.experts.local_experts.{expert}.linear_fc1.weight", _L + "mlp.experts.linear_fc1.weight{expert}"),
                       (_H + "mlp.gate_proj.weight", _H + "mlp.up_proj.weight"), Sharding.GATED),
    Row("expert_fc2",  (_L + "mlp.experts.local_experts.{expert}.linear_fc2.weight", _L + "mlp.experts.linear_fc2.weight{expert}"),
                       (_H + "mlp.down_proj.weight",),                          Sharding.COLUMNS),
    Row("shared_fc1",  (_L + "mlp.shared_experts.linear_fc1.weight",),
                       (_H + "mlp.gate_proj.weight", _H + "mlp.up_proj.weight"), Sharding.GATED),
    Row("shared_fc2",  (_L + "mlp.shared_experts.linear_fc2.weight",),
                       (_H + "mlp.down_proj.weight",),                          Sharding.COLUMNS),
    Row("final_norm",  ("decoder.final_layernorm.weight",),
                       ("model.norm.weight",),                                  Sharding.WHOLE),
    Row("output",      ("output_layer.weight",),
                       ("lm_head.weight",),                                     Sharding.VOCABULARY),
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
"""What the rows of the MoE layers are called in each architecture; all others keep their names."""
# fmt: on

ROW_OF_ROLE = {row.role: row for row in ROWS}
GATE_ROLES = frozenset({"router_noise", "router_output"})
"""Rows of the noisy gate, which no Hugging Face architecture has."""
MOE_ROLES = GATE_ROLES | {"router", "expert_fc1", "expert_fc2", "shared_fc1", "shared_fc2"}
"""Rows that a dense model does not have."""


@dataclass(frozen=True, slots=True)
class Match:
    """A Megatron parameter name, read: which row, which layer and expert of this rank."""

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
    """The row that ``parameter``, a Megatron-Core name, belongs to; None if no row knows it.

    >>> found = match("decoder.layers.3.mlp.experts.linear_fc1.weight12")
    >>> found.row.role, found.layer, found.expert
    ('expert_fc1', 3, 12)
    """
    for pattern, row in _PATTERNS:
        if found := pattern.fullmatch(parameter):
            groups = {key: int(value) for key, value in found.groupdict().items()}
            return Match(row, groups.get("layer"), groups.get("expert"))
    return None


def dense_tensors(spec: DenseSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor that a dense folder of this shape must hold."""
    for row in ROWS:
        if row.role in MOE_ROLES or not has_row(row.role, spec):
            continue
        layers = range(spec.num_layers) if "{layer}" in row.hf[0] else (0,)
        for layer in layers:
            for template, shape in zip(row.hf, dense_shapes(row.role, spec), strict=True):
                yield template.format(layer=layer), shape


def has_row(role: str, spec: DenseSpec) -> bool:
    """Whether a model of this shape has the row at all."""
    match role:
        case "qkv_bias":
            return spec.qkv_bias
        case "q_norm" | "k_norm":
            return spec.qk_layernorm
        case "output":
            return not spec.tied_embeddings
        case _:
            return True


def dense_shapes(role: str, spec: DenseSpec) -> tuple[tuple[int, ...], ...]:
    """Shapes of the row's Hugging Face tensors, in the order of ``Row.hf``."""
    hidden, ffn, head = spec.hidden_size, spec.ffn_hidden_size, spec.kv_channels
    queries, keys = spec.num_attention_heads * head, spec.num_query_groups * head
    shapes: dict[str, tuple[tuple[int, ...], ...]] = {
        "embedding": ((spec.vocab_size, hidden),),
        "output": ((spec.vocab_size, hidden),),
        "qkv": ((queries, hidden), (keys, hidden), (keys, hidden)),
        "qkv_bias": ((queries,), (keys,), (keys,)),
        "q_norm": ((head,),),
        "k_norm": ((head,),),
        "proj": ((hidden, queries),),
        "fc1": ((ffn, hidden), (ffn, hidden)),
        "fc2": ((hidden, ffn),),
    }
    return shapes.get(role, ((hidden,),))
