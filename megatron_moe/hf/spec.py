"""Read the shape of a dense Hugging Face model from its ``config.json``.

Needs neither torch nor transformers: ``plan`` reads a folder that has only a ``config.json``.
Missing keys get the defaults of transformers 5 for the model's family. A configuration that would
make the model compute anything else than this package builds is rejected, with all reasons at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_moe.errors import CheckpointError
from megatron_moe.hf.families import FAMILIES, FAMILY_OF_ARCHITECTURE, Family
from megatron_moe.hf.obtain import how_to_get

COMMON_DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-6, "initializer_range": 0.02}
"""Defaults of transformers 5 for keys missing in config.json; `FamilyRow.defaults` has others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Scaling of the rotary frequencies as in Llama 3.1 (``rope_type: llama3``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseSpec:
    """Shape of a dense Llama-family model, with Megatron-Core's names."""

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
    """Whether the output layer shares the embedding's weights."""
    qkv_bias: bool
    qk_layernorm: bool
    initializer_range: float
    eos_token_id: int | None
    """Id of the end of text; the first if config.json lists several."""
    bos_token_id: int | None

    @property
    def separate_output(self) -> bool:
        """Whether the output layer has its own weights."""
        return not self.tied_embeddings


def read_spec(folder: Path) -> DenseSpec:
    """Read the shape of the dense model from ``folder/config.json``.

    Raises:
        CheckpointError: config.json cannot be read, or this package cannot reproduce the model
            exactly; the message lists all reasons.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror or error}.\n"
            "  source.path must be a Hugging Face folder: config.json, *.safetensors, tokenizer\n"
            + how_to_get(folder)
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    return spec_from_config(config, where=str(path))


def spec_from_config(config: Mapping[str, Any], *, where: str = "config.json") -> DenseSpec:
    """Convert a parsed ``config.json``; error messages start with ``where``. See `read_spec`."""
    family = _family(config) if isinstance(config, dict) else None
    if family is None:
        raise _refusal(where, [_other_architecture(config)])
    config = {**COMMON_DEFAULTS, **FAMILIES[family].defaults, **config}
    bad_numbers = _bad_numbers(config)
    reasons = [*bad_numbers, *_unsupported(config, family), *_unsupported_rope(config)]
    if not bad_numbers:
        reasons += _unsupported_windows(config, family)
    if reasons:
        raise _refusal(where, reasons)
    rope = _rope_parameters(config)
    return DenseSpec(
        family=family,
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=config["num_attention_heads"],
        num_query_groups=_num_query_groups(config),
        kv_channels=_kv_channels(config),
        vocab_size=config["vocab_size"],
        max_position_embeddings=config["max_position_embeddings"],
        layernorm_epsilon=config["rms_norm_eps"],
        rotary_base=float(rope["rope_theta"]),
        rope_scaling=_llama3_scaling(rope),
        tied_embeddings=bool(config.get("tie_word_embeddings")),
        qkv_bias=FAMILIES[family].qkv_bias,
        qk_layernorm=FAMILIES[family].qk_layernorm,
        initializer_range=config["initializer_range"],
        eos_token_id=_first(config.get("eos_token_id")),
        bos_token_id=_first(config.get("bos_token_id")),
    )


# ---- rejected models -----------------------------------------------------------------------------


def _refusal(where: str, reasons: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{where} is not a dense model that can be upcycled:\n"
        + "\n".join(f"  {reason}" for reason in reasons)
    )


def _family(config: Mapping[str, Any]) -> Family | None:
    architectures = config.get("architectures")
    if not architectures:  # a config that was saved without a model; use its model_type
        return next((f for f in FAMILIES if f == config.get("model_type")), None)
    return FAMILY_OF_ARCHITECTURE.get(architectures[0]) if len(architectures) == 1 else None


def _other_architecture(config: object) -> str:
    name = config.get("architectures") if isinstance(config, dict) else type(config).__name__
    return (
        f"architectures is {name}: supported are {', '.join(FAMILY_OF_ARCHITECTURE)}, "
        "which use RMSNorm, rotary attention and SwiGLU"
    )


def _bad_numbers(config: Mapping[str, Any]) -> list[str]:
    """Return reasons for sizes that are missing, not numbers, or inconsistent."""
    integers = (
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "vocab_size",
        "max_position_embeddings",
    )
    optional = ("num_key_value_heads", "head_dim", "sliding_window")
    optional = [key for key in optional if config.get(key) is not None]
    reasons = [f"{key} is missing" for key in integers if key not in config]
    reasons += [
        f"{key} is {config[key]!r}: must be a positive integer"
        for key in (*integers, *optional)
        if key in config and not _is_positive(config[key], int)
    ]
    reasons += [
        f"{key} is {value!r}: must be a positive number"
        for key, value in _real_numbers(config).items()
        if not _is_positive(value, int, float)
    ]
    return reasons or _misfits(config)


def _real_numbers(config: Mapping[str, Any]) -> dict[str, Any]:
    rope = _rope_parameters(config)
    scaling = _LLAMA3_KEYS if _rope_type(rope) == "llama3" else ()
    return {
        "rms_norm_eps": config["rms_norm_eps"],
        "initializer_range": config["initializer_range"],
        "rope_theta": rope["rope_theta"],
        **{f"{key} of rope_type llama3": rope.get(key) for key in scaling},
    }


def _is_positive(value: Any, *kinds: type) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool) and 0 < value < float("inf")


def _misfits(config: Mapping[str, Any]) -> list[str]:
    heads, groups = config["num_attention_heads"], _num_query_groups(config)
    reasons = []
    if heads % groups:
        reasons.append(
            f"num_attention_heads ({heads}) must be divisible by num_key_value_heads ({groups}): "
            "each group of query heads shares one key head"
        )
    if config.get("head_dim") is None and config["hidden_size"] % heads:
        reasons.append(
            f"hidden_size ({config['hidden_size']}) must be divisible by num_attention_heads "
            f"({heads}), because there is no head_dim"
        )
    elif _kv_channels(config) % 2:
        reasons.append(
            f"head_dim is {_kv_channels(config)}: must be even, because rotary attention rotates "
            "pairs"
        )
    return reasons


def _unsupported(config: Mapping[str, Any], family: Family) -> list[str]:
    """Return reasons for features of the configuration that this package does not support."""
    reasons = []
    if (kind := config.get("model_type", family)) != family:
        reasons.append(f"model_type is {kind!r}, but architectures is {config['architectures'][0]}")
    if (act := config.get("hidden_act", "silu")) != "silu":
        reasons.append(f"hidden_act is {act!r}: experts are SwiGLU, so it must be 'silu'")
    if config.get("mlp_bias"):
        reasons.append("mlp_bias is true: experts have no biases")
    # transformers ignores the key where query, key and value always have biases.
    if config.get("attention_bias") and not FAMILIES[family].qkv_bias:
        reasons.append(
            "attention_bias is true: a bias of the attention's output projection is not supported"
        )
    reasons += [
        f"{dropout} is {config[dropout]}: must be 0"
        for dropout in ("attention_dropout", "resid_pdrop", "embd_pdrop")
        if config.get(dropout)
    ]
    if config.get("quantization_config"):
        reasons.append("quantization_config is set: dequantize the checkpoint to bf16 first")
    return reasons


def _unsupported_rope(config: Mapping[str, Any]) -> list[str]:
    rope = _rope_parameters(config)
    reasons = []
    if (rope_type := _rope_type(rope)) not in ("default", "llama3"):
        reasons.append(f"rope_type is {rope_type!r}: only default and llama3 are supported")
    if nested := [key for key, value in rope.items() if isinstance(value, dict)]:
        reasons.append(f"rope_parameters differ by layer type ({', '.join(nested)}): not supported")
    if (part := rope.get("partial_rotary_factor")) not in (None, 1):
        reasons.append(f"partial_rotary_factor is {part}: must be 1, heads are rotated as a whole")
    return reasons


def _unsupported_windows(config: Mapping[str, Any], family: Family) -> list[str]:
    """Return reasons for layers whose attention window is shorter than the context."""
    kinds = config.get("layer_types") or []
    if others := sorted({str(kind) for kind in kinds} - {"full_attention"}):
        return [f"layer_types has {', '.join(others)}: every layer must be full_attention"]
    window, length = config.get("sliding_window"), config["max_position_embeddings"]
    match FAMILIES[family].windows:
        case "ignored":
            return []
        case "always":
            remedy = "sliding_window to null"
        case "on_request":
            first = config["max_window_layers"]
            if (
                not config.get("use_sliding_window")
                or kinds
                or first >= config["num_hidden_layers"]
            ):
                return []
            remedy = "use_sliding_window to false"
    if not window or window >= length:
        return []
    return [
        f"sliding_window is {window}, shorter than max_position_embeddings ({length}): sliding-"
        f"window attention is not supported; set {remedy} if all sequences fit into the window"
    ]


# ---- values that depend on several keys ----------------------------------------------------------

_LLAMA3_KEYS = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


def _num_query_groups(config: Mapping[str, Any]) -> int:
    return config.get("num_key_value_heads") or config["num_attention_heads"]


def _kv_channels(config: Mapping[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Collect the rotary settings as transformers 5 does.

    Version 5 writes ``rope_parameters``; version 4 wrote ``rope_theta`` and ``rope_scaling``. If
    both are present, ``rope_scaling`` takes precedence.
    """
    defaults = {"rope_theta": config.get("rope_theta", 10000.0)}
    if "partial_rotary_factor" in config:
        defaults["partial_rotary_factor"] = config["partial_rotary_factor"]
    return {**defaults, **(config.get("rope_scaling") or config.get("rope_parameters") or {})}


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
    return next(iter(value), None) if isinstance(value, list) else value
