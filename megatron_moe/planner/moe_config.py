"""Read the shape of a Hugging Face model, dense or MoE, from its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_moe.errors import CheckpointError
from megatron_moe.hf.spec import spec_from_config
from megatron_moe.json_text import parse_json
from megatron_moe.planner.shape import MoeShape, dense_shape


@dataclass(frozen=True, slots=True)
class MoeKeys:
    """The config.json key of the expert size of an architecture, and its fixed properties."""

    expert_size: str
    qkv_bias: bool = False
    qk_layernorm: bool = False


KEYS_OF_ARCHITECTURE: dict[str, MoeKeys] = {
    "MixtralForCausalLM": MoeKeys("intermediate_size"),
    "Qwen2MoeForCausalLM": MoeKeys("moe_intermediate_size", qkv_bias=True),
    "Qwen3MoeForCausalLM": MoeKeys("moe_intermediate_size", qk_layernorm=True),
}


def read_config(folder: Path) -> dict[str, Any]:
    """Parse ``folder/config.json``.

    Raises:
        CheckpointError: The file cannot be read or is not JSON.
    """
    path = folder / "config.json"
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error


def shape_from_hf(config: Mapping[str, Any], *, where: str = "config.json") -> MoeShape:
    """Return the shape of the model of a parsed config.json; ``where`` starts error messages.

    Raises:
        CheckpointError: The architecture is neither a supported dense nor a known MoE model, or a
            size is missing.
    """
    architecture = (config.get("architectures") or ["none named"])[0]
    if architecture not in KEYS_OF_ARCHITECTURE:
        return dense_shape(spec_from_config(config, where=where))
    try:
        return _moe_shape(config, KEYS_OF_ARCHITECTURE[architecture])
    except KeyError as error:
        raise CheckpointError(f"{where} of a {architecture} lacks {error}") from error


def _moe_shape(config: Mapping[str, Any], keys: MoeKeys) -> MoeShape:
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    shared = config.get("shared_expert_intermediate_size") or 0
    every = config.get("decoder_sparse_step", 1)
    # transformers 5 writes num_local_experts; version 4 wrote num_experts for all but Mixtral.
    experts = "num_local_experts" if "num_local_experts" in config else "num_experts"
    dense = set(config.get("mlp_only_layers") or ())
    return MoeShape(
        num_layers=layers,
        moe_layers=frozenset(
            layer for layer in range(layers) if layer not in dense and (layer + 1) % every == 0
        ),
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=config.get("num_key_value_heads") or heads,
        kv_channels=config.get("head_dim") or config["hidden_size"] // heads,
        vocab_size=config["vocab_size"],
        tied_embeddings=config.get("tie_word_embeddings", False),
        qkv_bias=keys.qkv_bias and config.get("qkv_bias", True),
        qk_layernorm=keys.qk_layernorm,
        num_moe_experts=config[experts],
        moe_router_topk=config["num_experts_per_tok"],
        moe_ffn_hidden_size=config[keys.expert_size],
        shared_expert_size=shared,
        shared_expert_gate=shared > 0,
    )
