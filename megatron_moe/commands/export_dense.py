"""Export a model of one expert per layer as the dense model that it is.

The weight of a single expert is a softmax over one logit, which is 1. So the expert takes the place
of the FFN, and the router is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from megatron_moe.commands.export_config import common_config
from megatron_moe.config.moe import Moe
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import CheckpointError
from megatron_moe.experts.plan import moe_layer_ids
from megatron_moe.hf.spec import ModelSpec

DenseArchitecture = Literal[
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"
]
_MODEL_TYPES: dict[DenseArchitecture, str] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_OWN: dict[DenseArchitecture, dict[str, Any]] = {
    "LlamaForCausalLM": {"attention_bias": False, "mlp_bias": False},
    "MistralForCausalLM": {},
    "Qwen2ForCausalLM": {"use_sliding_window": False},
    "Qwen3ForCausalLM": {"use_sliding_window": False, "attention_bias": False},
}
"""Keys of config.json that only one architecture has."""


def dense_architecture(spec: ModelSpec, moe: Moe) -> DenseArchitecture:
    """Return the dense architecture that computes what a model of one expert computes.

    Raises:
        CheckpointError: It has several experts, or none computes it; the message says why.
    """
    if reasons := list(_reasons(spec, moe)):
        raise CheckpointError(
            f"the {spec.family} model cannot be written as a dense model:\n  "
            + "\n  ".join(reasons)
            + "\n  leave --dense out, or start a run with upcycle.method=prune, "
            "upcycle.choose=merge, moe.num_moe_experts=1 and moe.moe_router_topk=1"
        )
    if spec.qk_layernorm:
        return "Qwen3ForCausalLM"
    if spec.qkv_bias:
        return "Qwen2ForCausalLM"
    return "MistralForCausalLM" if spec.attention_windows else "LlamaForCausalLM"


def _reasons(spec: ModelSpec, moe: Moe) -> Iterator[str]:
    size = moe.expert_size(spec.ffn_hidden_size)
    mixed = len(moe_layer_ids(moe, spec.num_layers)) < spec.num_layers
    if moe.num_moe_experts > 1:
        yield f"moe.num_moe_experts ({moe.num_moe_experts}) must be 1"
    if moe.moe_router_score_function == "sigmoid":
        yield "moe.moe_router_score_function (sigmoid): the weight of a single expert is its score"
    if moe.shared_size:
        yield f"moe.moe_shared_expert_intermediate_size ({moe.shared_size}): a second FFN per layer"
    if mixed and size != spec.ffn_hidden_size:
        yield f"its FFNs have different sizes: {size} and {spec.ffn_hidden_size}"
    if spec.layers_without_rotary:
        yield "some layers have no rotary embedding"
    if spec.qk_norm_spans_heads:
        yield "the norms of query and key span all heads"
    if spec.qk_layernorm and spec.qkv_bias:
        yield "query and key have norms and biases"
    windows = set(spec.attention_windows)
    if len(windows) > 1 or (windows and (spec.qk_layernorm or spec.qkv_bias)):
        yield "its attention windows are those of some layers, or of a family with norms or biases"


def dense_hf_config(
    spec: ModelSpec, config: RunConfig, architecture: DenseArchitecture, source: dict[str, Any]
) -> dict[str, Any]:
    """Return ``config.json`` of the dense model; see `export_config.moe_config`."""
    result = {
        **common_config(spec, config, architecture, _MODEL_TYPES[architecture], source),
        **_OWN[architecture],
        "intermediate_size": config.moe.expert_size(spec.ffn_hidden_size),
    }
    if architecture == "MistralForCausalLM":
        result["sliding_window"] = spec.attention_windows[0]
    return result
