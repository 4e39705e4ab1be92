"""Read the shape of a Hugging Face model, dense or MoE, from its ``config.json``.

Needs neither torch nor transformers: ``plan`` reads a folder that has only a ``config.json``.
Missing keys get the defaults of transformers 5 for the model's family. A configuration that would
make the model compute anything else than this package builds is rejected, with all reasons at once.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_moe.errors import CheckpointError
from megatron_moe.hf.families import FAMILIES, FAMILY_OF_ARCHITECTURE, REFUSED, Family
from megatron_moe.hf.moe_spec import ExpertsSpec, expert_sizes, read_experts, unsupported_experts
from megatron_moe.hf.obtain import how_to_get
from megatron_moe.hf.rope import (
    RopeScaling,
    rope_numbers,
    rope_parameters,
    rope_scaling,
    unsupported_rope,
)
from megatron_moe.json_text import parse_json
from megatron_moe.regular_file import regular

COMMON_DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-6, "initializer_range": 0.02}
"""Defaults of transformers 5 for keys missing in config.json; `FamilyRow.defaults` has others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Multipliers:
    """Constants by which Granite multiplies activations."""

    embedding: float = 1.0
    """Factor of the embeddings, where the residual stream starts."""
    residual: float = 1.0
    """Factor of the outputs of attention and FFN, before they are added to the residual stream."""
    attention: float | None = None
    """Factor of the products of query and key; None for ``1 / sqrt(head width)``."""
    logits: float = 1.0
    """Divisor of the logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Shape of a Llama-family model, dense or MoE, with Megatron-Core's names."""

    family: Family
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Neurons of the FFN of layers without experts."""
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
    attention_windows: tuple[int | None, ...] = ()
    """Tokens that each layer attends to, None for the whole context; empty if no layer has a
    window."""
    layers_without_rotary: tuple[int, ...] = ()
    """Layers whose queries and keys are not rotated."""
    qk_norm_spans_heads: bool = False
    """Whether the RMSNorm of query and key is over all heads at once."""
    post_norms: bool = False
    """Whether RMSNorm comes after attention and FFN instead of before them."""
    multipliers: Multipliers = Multipliers()
    experts: ExpertsSpec | None = None
    """The MoE layers; None for a dense model."""

    @property
    def pre_norms(self) -> bool:
        """Whether RMSNorm comes before attention and FFN."""
        return not self.post_norms

    @property
    def separate_output(self) -> bool:
        """Whether the output layer has its own weights."""
        return not self.tied_embeddings


def read_spec(folder: Path) -> ModelSpec:
    """Read the shape of the model from ``folder/config.json``.

    Raises:
        CheckpointError: config.json cannot be read, or this package cannot reproduce the model
            exactly; the message lists all reasons.
    """
    path = folder / "config.json"
    try:
        config = parse_json(regular(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror or error}.\n"
            "  source.path must be a Hugging Face folder: config.json, *.safetensors, tokenizer\n"
            + how_to_get(folder)
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    return spec_from_config(config, where=str(path))


def spec_from_config(config: Mapping[str, Any], *, where: str = "config.json") -> ModelSpec:
    """Convert a parsed ``config.json``; error messages start with ``where``. See `read_spec`."""
    family = _family(config) if isinstance(config, dict) else None
    if family is None:
        raise _refusal(where, [_other_architecture(config)])
    config = {**COMMON_DEFAULTS, **FAMILIES[family].defaults, **config}
    if wrong_kinds := _wrong_kinds(config):
        raise _refusal(where, wrong_kinds)
    bad_numbers = _bad_numbers(config, family)
    reasons = [*bad_numbers, *_unsupported(config, family), *_unsupported_rope(config, family)]
    reasons += _unsupported_layers(config, family)
    moe = FAMILIES[family].moe
    if moe is not None and not bad_numbers:
        reasons += unsupported_experts(config, moe)
    if reasons:
        raise _refusal(where, reasons)
    return ModelSpec(
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
        rotary_base=float(rope_parameters(config)["rope_theta"]),
        rope_scaling=rope_scaling(config),
        tied_embeddings=bool(config.get("tie_word_embeddings")),
        qkv_bias=_has(config, FAMILIES[family].qkv_bias),
        qk_layernorm=_has(config, FAMILIES[family].qk_layernorm),
        initializer_range=config["initializer_range"],
        eos_token_id=_first(config.get("eos_token_id")),
        bos_token_id=_first(config.get("bos_token_id")),
        attention_windows=_attention_windows(config, family),
        layers_without_rotary=_layers_without_rotary(config, family),
        qk_norm_spans_heads=FAMILIES[family].qk_norm_spans_heads,
        post_norms=FAMILIES[family].post_norms,
        multipliers=_multipliers(config) if FAMILIES[family].multipliers else Multipliers(),
        experts=None if moe is None else read_experts(config, moe),
    )


def _has(config: Mapping[str, Any], property_or_key: bool | str) -> bool:
    """Return a property of a family that is fixed, or that a key of config.json switches on."""
    if isinstance(property_or_key, str):
        return bool(config.get(property_or_key))
    return property_or_key


# ---- rejected models -----------------------------------------------------------------------------


def _refusal(where: str, reasons: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{where} is not a model that can be upcycled:\n"
        + "\n".join(f"  {reason}" for reason in reasons)
    )


def _family(config: Mapping[str, Any]) -> Family | None:
    architectures = config.get("architectures")
    if not architectures:  # a config that was saved without a model; use its model_type
        return next((f for f in FAMILIES if f == config.get("model_type")), None)
    one = isinstance(architectures, list) and len(architectures) == 1
    return FAMILY_OF_ARCHITECTURE.get(str(architectures[0])) if one else None


def _other_architecture(config: object) -> str:
    name = config.get("architectures") if isinstance(config, dict) else type(config).__name__
    one = str(name[0]) if isinstance(name, list) and name else ""
    reason = f"it has {REFUSED[one]}; " if one in REFUSED else ""
    return (
        f"architectures is {name}: {reason}supported are {', '.join(FAMILY_OF_ARCHITECTURE)}, "
        "which use RMSNorm, rotary attention and SwiGLU"
    )


_KINDS: dict[str, type] = {
    "rope_scaling": dict, "rope_parameters": dict, "layer_types": list, "hidden_act": str,
    "no_rope_layers": list,
    "mlp_only_layers": list,
}  # fmt: skip
"""Kinds of values that are not numbers; null counts as absent."""


def _wrong_kinds(config: Mapping[str, Any]) -> list[str]:
    """Return reasons for values of another JSON type than their key has."""
    values = {key: (config.get(key), kind) for key, kind in _KINDS.items()}
    for rope in ("rope_scaling", "rope_parameters"):
        if isinstance(config.get(rope), dict):
            values |= {
                f"{rope}.{key}": (config[rope].get(key), str) for key in ("rope_type", "type")
            }
    names = {dict: "an object", list: "a list", str: "text"}
    return [
        f"{key} is {value!r:.100}: must be {names[kind]}"
        for key, (value, kind) in values.items()
        if value is not None and not isinstance(value, kind)
    ]


def _bad_numbers(config: Mapping[str, Any], family: Family) -> list[str]:
    """Return reasons for sizes that are missing, not numbers, or inconsistent."""
    moe = FAMILIES[family].moe
    integers = [
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "vocab_size",
        "max_position_embeddings",
        *(expert_sizes(config, moe) if moe is not None else ()),
    ]
    integers = list(
        dict.fromkeys(integers)
    )  # some families name an expert's size as others an FFN's
    optional = ("num_key_value_heads", "head_dim", "sliding_window", "no_rope_layer_interval")
    optional = [key for key in optional if config.get(key) is not None]
    if config.get("sliding_window") == 0:  # transformers 5 writes 0 for no window in Qwen2-MoE
        optional.remove("sliding_window")
    reasons = [f"{key} is missing" for key in integers if key not in config]
    reasons += [
        f"{key} is {config[key]!r:.99}: must be a positive integer of at most {_largest(key):,}"
        for key in (*integers, *optional)
        if key in config
        if not (_is_positive(config[key], int) and config[key] <= _largest(key))
    ]
    reasons += [
        f"{key} is {value!r:.99}: must be a positive number"
        for key, value in _real_numbers(config, family).items()
        if not _is_positive(value, int, float)
    ]
    return reasons or _misfits(config)


_MULTIPLIERS = (
    "embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling",
)  # fmt: skip


def _real_numbers(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    return {
        "rms_norm_eps": config["rms_norm_eps"],
        "initializer_range": config["initializer_range"],
        **rope_numbers(config),
        **{key: config[key] for key in _MULTIPLIERS if FAMILIES[family].multipliers},
    }


def _largest(key: str) -> int:
    """Return the largest plausible value, beyond which even listing the tensors takes forever."""
    return 10_000 if key == "num_hidden_layers" else 2**31 - 1


def _is_positive(value: Any, *kinds: type) -> bool:
    number = isinstance(value, kinds) and not isinstance(value, bool)
    return number and 0 < value <= sys.float_info.max


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
        reasons.append(
            "mlp_bias is true: experts have no biases; if all of them are zero, save the model "
            "again without them"
        )
    # transformers ignores the key where query, key and value always have biases.
    if config.get("attention_bias") and not FAMILIES[family].qkv_bias:
        reasons.append(
            "attention_bias is true: a bias of the attention's output projection is not supported; "
            "if all biases are zero, save the model again without them"
        )
    reasons += [
        f"{dropout} is {config[dropout]}: must be 0"
        for dropout in ("attention_dropout", "resid_pdrop", "embd_pdrop")
        if config.get(dropout)
    ]
    if config.get("quantization_config"):
        reasons.append("quantization_config is set: dequantize the checkpoint to bf16 first")
    return reasons


def _unsupported_rope(config: Mapping[str, Any], family: Family) -> list[str]:
    reasons = unsupported_rope(config)
    kind = rope_parameters(config)["rope_type"]
    if not reasons and kind != "default" and not FAMILIES[family].rope_scaling:
        return [f"rope_type is {kind!r}: transformers does not have it for {family}"]
    return reasons


def _attention_windows(config: Mapping[str, Any], family: Family) -> tuple[int | None, ...]:
    """Return the attention window of each layer in tokens, None for a whole context.

    As transformers 5 does: ``layer_types`` counts if it is there, and windows that are as long as
    the context are none.
    """
    count, window = config["num_hidden_layers"], config.get("sliding_window")
    kinds = config.get("layer_types")
    match FAMILIES[family].windows:
        case "ignored":
            windowed = [False] * count
        case "without_rotary_on_request":
            without = _layers_without_rotary(config, family)
            on = bool(config.get("use_sliding_window"))
            windowed = [on and layer in without for layer in range(count)]
        case "always":
            windowed = [True] * count
        case "all_on_request":
            windowed = [bool(config.get("use_sliding_window"))] * count
        case "even_on_request":
            last = min(config["max_window_layers"], count)
            named = ["sliding_attention" if i % 2 == 0 and i < last else "full_attention"
                     for i in range(count)]  # fmt: skip
            on = bool(config.get("use_sliding_window"))
            windowed = [on and kind == "sliding_attention" for kind in (kinds or named)[:count]]
        case "on_request":
            first = config["max_window_layers"]
            kinds = kinds or ["full_attention"] * first + ["sliding_attention"] * (count - first)
            on = bool(config.get("use_sliding_window"))
            windowed = [on and kind == "sliding_attention" for kind in kinds[:count]]
    if not window or window >= config["max_position_embeddings"] or not any(windowed):
        return ()
    return tuple(window if sliding else None for sliding in windowed)


def _layers_without_rotary(config: Mapping[str, Any], family: Family) -> tuple[int, ...]:
    """Return the layers whose entry of ``no_rope_layers`` is 0, or every n-th layer."""
    if not FAMILIES[family].skips_rotary:
        return ()
    count, every = config["num_hidden_layers"], config["no_rope_layer_interval"]
    rotates = config.get("no_rope_layers") or [(i + 1) % every != 0 for i in range(count)]
    return tuple(i for i in range(count) if not rotates[i])


def _unsupported_layers(config: Mapping[str, Any], family: Family) -> list[str]:
    """Return a reason if a layer is of a kind that this package does not build."""
    kinds = {str(kind) for kind in config.get("layer_types") or []}
    rotates = config.get("no_rope_layers")
    if FAMILIES[family].skips_rotary and rotates:
        count = config.get("num_hidden_layers")
        if not set(map(str, rotates)) <= {"0", "1"} or len(rotates) < (count or 0):
            return ["no_rope_layers must have a 1 (rotary embedding) or 0 (none) for every layer"]
    known = {"full_attention"}
    if FAMILIES[family].windows.endswith("on_request"):
        known.add("sliding_attention")
    if others := sorted(kinds - known):
        return [f"layer_types has {', '.join(others)}: every layer must be full_attention"]
    return []


# ---- values that depend on several keys ----------------------------------------------------------


def _num_query_groups(config: Mapping[str, Any]) -> int:
    return config.get("num_key_value_heads") or config["num_attention_heads"]


def _kv_channels(config: Mapping[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _multipliers(config: Mapping[str, Any]) -> Multipliers:
    return Multipliers(
        embedding=float(config["embedding_multiplier"]),
        residual=float(config["residual_multiplier"]),
        attention=float(config["attention_multiplier"]),
        logits=float(config["logits_scaling"]),
    )


def _first(value: int | list[int] | None) -> int | None:
    return next(iter(value), None) if isinstance(value, list) else value
