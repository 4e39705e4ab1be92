"""What a dense Hugging Face model is: the numbers of its ``config.json``, and nothing else.

No torch and no transformers here: ``plan`` reads a folder that holds only a ``config.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_moe.errors import CheckpointError

Family = Literal["llama", "mistral", "qwen2", "qwen3"]

FAMILY_OF_ARCHITECTURE: dict[str, Family] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's stretching of the rotary frequencies (``rope_type: llama3``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseSpec:
    """Shape of a dense Llama-family model, in Megatron-Core's names."""

    family: Family
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    """Width of one head (head_dim)."""
    vocab_size: int
    max_position_embeddings: int
    layernorm_epsilon: float
    rotary_base: float
    rope_scaling: RopeScaling | None
    tied_embeddings: bool
    """The output layer is the embedding, transposed."""
    qkv_bias: bool
    qk_layernorm: bool
    initializer_range: float
    eos_token_id: int | None
    bos_token_id: int | None


def read_spec(folder: Path) -> DenseSpec:
    """The dense model that ``folder/config.json`` promises.

    Raises:
        CheckpointError: No readable config.json, or a model that this package cannot reproduce
            exactly; all reasons are listed.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror or error}.\n"
            "  dense.path must be a Hugging Face folder: config.json, *.safetensors, tokenizer"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    return spec_from_config(config, where=str(path))


def spec_from_config(config: Mapping[str, Any], *, where: str = "config.json") -> DenseSpec:
    """The same from the parsed ``config.json``; ``where`` opens the error messages."""
    if reasons := _unsupported(config):
        raise CheckpointError(
            f"{where} is not a dense model that can be upcycled:\n"
            + "\n".join(f"  {reason}" for reason in reasons)
        )
    family = FAMILY_OF_ARCHITECTURE[config["architectures"][0]]
    rope = _rope_parameters(config)
    heads = config["num_attention_heads"]
    return DenseSpec(
        family=family,
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=config.get("num_key_value_heads") or heads,
        kv_channels=config.get("head_dim") or config["hidden_size"] // heads,
        vocab_size=config["vocab_size"],
        max_position_embeddings=config.get("max_position_embeddings", 2048),
        layernorm_epsilon=config.get("rms_norm_eps", 1e-6),
        rotary_base=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        rope_scaling=_llama3_scaling(rope),
        tied_embeddings=config.get("tie_word_embeddings", False),
        qkv_bias=family == "qwen2" and config.get("attention_bias", True),
        qk_layernorm=family == "qwen3",
        initializer_range=config.get("initializer_range", 0.02),
        eos_token_id=_first(config.get("eos_token_id")),
        bos_token_id=_first(config.get("bos_token_id")),
    )


_REQUIRED = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
)


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    """Every reason why the model cannot be reproduced exactly, in words for the user."""
    architecture = (config.get("architectures") or ["none named"])[0]
    if architecture not in FAMILY_OF_ARCHITECTURE:
        return [
            f"architectures is {architecture}: supported are {', '.join(FAMILY_OF_ARCHITECTURE)}, "
            "whose layers are RMSNorm, rotary attention and SwiGLU"
        ]
    reasons = [f"{key} is missing" for key in _REQUIRED if key not in config]
    rope_type = _rope_type(_rope_parameters(config))
    if rope_type not in ("default", "llama3"):
        reasons.append(f"rope_type is {rope_type!r}: only default and llama3 are supported")
    if (act := config.get("hidden_act", "silu")) != "silu":
        reasons.append(f"hidden_act is {act!r}: experts are SwiGLU, so it must be 'silu'")
    if config.get("mlp_bias"):
        reasons.append("mlp_bias is true: experts have no biases to put them in")
    if config.get("attention_bias") and FAMILY_OF_ARCHITECTURE[architecture] != "qwen2":
        reasons.append(
            "attention_bias is true: biases of all four projections have no MoE architecture "
            "of Hugging Face to be exported to"
        )
    if config.get("attention_dropout"):
        reasons.append(f"attention_dropout is {config['attention_dropout']}: must be 0")
    if config.get("quantization_config"):
        reasons.append("quantization_config is set: dequantize the checkpoint to bf16 first")
    if _slides(config):
        reasons.append(
            f"sliding_window is {config['sliding_window']}, shorter than max_position_embeddings "
            f"({config.get('max_position_embeddings')}): windowed attention is not supported; "
            "set it to null if you train on sequences within the window"
        )
    return reasons


def _slides(config: Mapping[str, Any]) -> bool:
    window = config.get("sliding_window")
    if not window or config.get("use_sliding_window") is False:
        return False
    return window < config.get("max_position_embeddings", 0)


def _rope_parameters(config: Mapping[str, Any]) -> Mapping[str, Any]:
    # transformers 5 writes rope_parameters, 4 wrote rope_theta and rope_scaling.
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _rope_type(rope: Mapping[str, Any]) -> str:
    return rope.get("rope_type") or rope.get("type") or "default"


def _llama3_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    if _rope_type(rope) != "llama3":
        return None
    return RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position_embeddings=int(rope["original_max_position_embeddings"]),
    )


def _first(value: int | list[int] | None) -> int | None:
    return value[0] if isinstance(value, list) else value
