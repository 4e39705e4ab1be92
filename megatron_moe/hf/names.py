"""Map Hugging Face tensors to Megatron-Core parameters and back: the only name table.

Upcycling reads it from Hugging Face to Megatron-Core, export in reverse, and both check against
it. A row lists the Hugging Face tensors of one Megatron parameter, and how tensor-parallel ranks
shard it; ``parallel/shards.py`` turns a row into slices. Rows list the names of both layer specs:
torch-native (CPU) first, then Transformer Engine if it fuses a norm into the following linear
layer.

Templates contain ``{layer}`` (global in Hugging Face names, local to the pipeline chunk in
Megatron names) and ``{expert}`` (global in Hugging Face names, local to the ep rank in Megatron
names).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from megatron_moe.hf.spec import DenseSpec


class Sharding(Enum):
    """Sharding of one parameter over the ranks of a tensor-parallel group."""

    WHOLE = "every rank holds all of it"
    VOCABULARY = "rows, after padding the vocabulary to equal parts"
    QKV = "whole query groups: their query heads, then key, then value"
    GATED = "rows of gate, then the same rows of up"
    COLUMNS = "columns"


@dataclass(frozen=True, slots=True)
class Row:
    """One Megatron parameter and the Hugging Face tensors it consists of."""

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
"""Hugging Face names of the MoE layers' rows in each architecture; other rows keep their names."""
# fmt: on

ROW_OF_ROLE = {row.role: row for row in ROWS}
GATE_ROLES = frozenset({"router_noise", "router_output"})
"""Rows of the noisy gate, which has no equivalent in any Hugging Face architecture."""
MOE_ROLES = GATE_ROLES | {"router", "expert_fc1", "expert_fc2", "shared_fc1", "shared_fc2"}
"""Rows that exist only in MoE models."""


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


def dense_tensors(spec: DenseSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of every tensor that a dense folder of this shape must contain."""
    for row in ROWS:
        if row.role in MOE_ROLES or not has_row(row.role, spec):
            continue
        layers = range(spec.num_layers) if "{layer}" in row.hf[0] else (0,)
        for layer in layers:
            for template, shape in zip(row.hf, dense_shapes(row.role, spec), strict=True):
                yield template.format(layer=layer), shape


def has_row(role: str, spec: DenseSpec) -> bool:
    """Return whether a model of this shape has the row."""
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
    """Return the shapes of the row's Hugging Face tensors, in the order of ``Row.hf``."""
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
