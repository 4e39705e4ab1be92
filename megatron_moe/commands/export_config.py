"""Build ``config.json`` of an exported model, with every number stated.

Families have different defaults: a Llama folder without ``rope_theta`` means 1e4, a Mixtral folder
without it 1e6. So nothing is left to a default, and no key of the source is copied that this
package does not know. `check_export` reads both files back with transformers and compares them.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from megatron_moe.config.moe import Moe
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import CheckpointError
from megatron_moe.experts.plan import moe_layer_ids
from megatron_moe.hf.dtypes import OF_PRECISION
from megatron_moe.hf.names import Architecture
from megatron_moe.hf.rope import rope_parameters
from megatron_moe.hf.spec import ModelSpec
from megatron_moe.json_text import parse_json

_MODEL_TYPES: dict[Architecture, str] = {
    "MixtralForCausalLM": "mixtral",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "OlmoeForCausalLM": "olmoe",
    "FlexOlmoForCausalLM": "flex_olmo",
    "Glm4MoeForCausalLM": "glm4_moe",
}
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_PROGRAM_SETTINGS = frozenset(
    {
        "attn_implementation", "_attn_implementation", "auto_map", "chunk_size_feed_forward",
        "dtype", "torch_dtype", "id2label", "label2id", "is_encoder_decoder", "_name_or_path",
        "output_attentions", "output_hidden_states", "problem_type", "return_dict",
        "transformers_version", "use_cache",
    }
)  # fmt: skip
"""Keys that configure a program, and not what the model computes."""
_NOT_COMPARED = _PROGRAM_SETTINGS | {
    "architectures", "model_type", "intermediate_size", "head_dim", "pad_token_id",
    # Some families write windows that no layer uses, and biases that no layer has.
    "layer_types", "max_window_layers", "sliding_window", "use_sliding_window", "attention_bias",
    # Methods for MoE sources change these, and training its loss; the export states each of them.
    "num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok",
    "norm_topk_prob", "n_shared_experts", "router_aux_loss_coef", "router_jitter_noise",
    "num_nextn_predict_layers", "num_mtp_layers", "decoder_sparse_step", "mlp_only_layers",
    "moe_intermediate_size",
}  # fmt: skip
"""Fields that may differ between transformers' config objects of the source and of the export."""


def moe_config(
    spec: ModelSpec, config: RunConfig, architecture: Architecture, source: dict[str, Any]
) -> dict[str, Any]:
    """Return ``config.json`` of the exported model.

    Args:
        spec: Shape of the source model.
        config: The run.
        architecture: Class of transformers that computes what the run trained.
        source: The source's ``config.json``; only its token ids are copied.
    """
    moe = config.moe
    result = {
        **common_config(spec, config, architecture, _MODEL_TYPES[architecture], source),
        "num_experts_per_tok": moe.moe_router_topk,
        "router_aux_loss_coef": moe.moe_aux_loss_coeff,
        "output_router_logits": False,
    }
    size = moe.expert_size(spec.ffn_hidden_size)
    windows = set(spec.attention_windows)
    if architecture != "Qwen2MoeForCausalLM" and len(windows) > 1:
        raise CheckpointError(
            f"no Hugging Face architecture means the same as a {spec.family} model with attention "
            "windows in some layers only: in Mixtral and Qwen3-MoE all layers have the same.\n"
            "  set use_sliding_window to false in the source's config.json "
            "if no text will be longer than the window"
        )
    if architecture == "MixtralForCausalLM":
        return {
            **result,
            "intermediate_size": size,
            "num_local_experts": moe.num_moe_experts,
            "router_jitter_noise": 0.0,
            "sliding_window": next(iter(windows), None),
        }
    if architecture in ("OlmoeForCausalLM", "FlexOlmoForCausalLM"):
        return {
            **result,
            "intermediate_size": size,
            "num_experts": moe.num_moe_experts,
            "norm_topk_prob": moe.router_order == "topk_softmax",
            "attention_bias": False,
            **({"clip_qkv": None} if architecture == "OlmoeForCausalLM" else {}),
        }
    if architecture == "Glm4MoeForCausalLM":
        return {**result, **_glm(spec, moe)}
    return {**result, **_qwen(spec, config, architecture, size)}


def common_config(
    spec: ModelSpec, config: RunConfig, architecture: str, model_type: str, source: dict[str, Any]
) -> dict[str, Any]:
    """Return the part of ``config.json`` that dense and MoE models have; see `moe_config`."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_attention_heads,
        "num_key_value_heads": spec.num_query_groups,
        "head_dim": spec.kv_channels,
        "hidden_act": "silu",
        "max_position_embeddings": spec.max_position_embeddings,
        "initializer_range": spec.initializer_range,
        # The export has Granite's residual stream divided by the multiplier of its embeddings.
        "rms_norm_eps": spec.layernorm_epsilon / spec.multipliers.embedding**2,
        "tie_word_embeddings": spec.tied_embeddings,
        **_rope(spec, source, architecture),
        **_token_ids(spec, source),
        "attention_dropout": 0.0,
        "use_cache": True,
        "dtype": str(OF_PRECISION[config.train.precision]).removeprefix("torch."),
    }


def _qwen(
    spec: ModelSpec, config: RunConfig, architecture: Architecture, size: int
) -> dict[str, Any]:
    moe = config.moe
    routed = set(moe_layer_ids(moe, spec.num_layers))
    result: dict[str, Any] = {
        "intermediate_size": spec.ffn_hidden_size,
        "num_experts": moe.num_moe_experts,
        "moe_intermediate_size": size,
        "norm_topk_prob": moe.router_order == "topk_softmax",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer in range(spec.num_layers) if layer not in routed],
        "use_sliding_window": bool(spec.attention_windows),
    }
    window = max((window for window in spec.attention_windows if window is not None), default=None)
    if window is not None:
        result["sliding_window"] = window
    if architecture == "Qwen3MoeForCausalLM":
        return {**result, "attention_bias": False}
    return {
        **result,
        "max_window_layers": spec.num_layers,
        "layer_types": [
            "full_attention" if window is None else "sliding_attention"
            for window in spec.attention_windows or (None,) * spec.num_layers
        ],
        # Qwen2-MoE always has a shared expert: one of no neurons adds exactly zero.
        "shared_expert_intermediate_size": moe.shared_size,
        "qkv_bias": spec.qkv_bias,
    }


def _glm(spec: ModelSpec, moe: Moe) -> dict[str, Any]:
    size = moe.expert_size(spec.ffn_hidden_size)
    return {
        "intermediate_size": spec.ffn_hidden_size,
        "n_routed_experts": moe.num_moe_experts,
        "moe_intermediate_size": size,
        "n_shared_experts": exported_shared_size(spec, moe, "Glm4MoeForCausalLM") // size,
        "first_k_dense_replace": spec.num_layers - len(moe_layer_ids(moe, spec.num_layers)),
        "norm_topk_prob": moe.moe_router_topk > 1,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "attention_bias": spec.qkv_bias,
        "use_qk_norm": spec.qk_layernorm,
        "num_nextn_predict_layers": 0,
        "partial_rotary_factor": 1.0,
    }


def exported_shared_size(spec: ModelSpec, moe: Moe, architecture: str) -> int:
    """Return the neurons of the shared expert in an export.

    GLM-4-MoE counts them in multiples of a routed expert; neurons of zeros fill the last one.
    """
    if architecture != "Glm4MoeForCausalLM":
        return moe.shared_size
    size = moe.expert_size(spec.ffn_hidden_size)
    return -(-moe.shared_size // size) * size


def _rope(spec: ModelSpec, source: dict[str, Any], architecture: str) -> dict[str, Any]:
    """Return the rotary settings as transformers 5 and, in the last two keys, 4 read them."""
    defaults = {
        "max_position_embeddings": spec.max_position_embeddings, "rope_theta": spec.rotary_base,
    }  # fmt: skip
    rope = rope_parameters({**defaults, **source})
    rope = _whole_heads(rope)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    if architecture == "Glm4MoeForCausalLM":  # half of a head by default
        rope["partial_rotary_factor"] = 1.0
    return {
        "rope_parameters": rope,
        "rope_theta": spec.rotary_base,
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
    }


def _token_ids(spec: ModelSpec, source: dict[str, Any]) -> dict[str, Any]:
    """Return the ids of special tokens: the source's, or those that its family has by default."""
    defaults = {"bos_token_id": spec.bos_token_id, "eos_token_id": spec.eos_token_id}
    return {key: source.get(key, defaults.get(key)) for key in _TOKEN_IDS}


def check_export(export: dict[str, Any], family: str, source: dict[str, Any]) -> None:
    """Compare what transformers reads from the export and from the source, field by field.

    Args:
        export: ``config.json`` of the export.
        family: ``model_type`` of the source.
        source: ``config.json`` of the source.

    Raises:
        CheckpointError: A field that both config classes have differs, or the export's class reads
            another value than the export states.
    """
    written = _read_by_transformers(export["model_type"], export)
    read = _read_by_transformers(family, source)
    read["rms_norm_eps"] /= read.get("embedding_multiplier", 1.0) ** 2
    stated = (export.keys() & written.keys()) - _PROGRAM_SETTINGS
    common = (read.keys() & written.keys()) - _NOT_COMPARED
    expected = {key: export[key] for key in stated} | {key: read[key] for key in common}
    expected["rope_parameters"] = _whole_heads(expected["rope_parameters"])
    problems = [
        f"  {key} is {written[key]}, but must be {value}"
        for key, value in sorted(expected.items())
        if written[key] != value
    ]
    if problems:
        raise CheckpointError(
            f"config.json of the export means something else to transformers than the {family} "
            "model that it comes from:\n" + "\n".join(problems)
        )


def _read_by_transformers(model_type: str, config: dict[str, Any]) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING  # imported here: it takes a second

    keys = {key: value for key, value in config.items() if key not in _PROGRAM_SETTINGS}
    try:
        read = CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(keys))
        read.standardize_rope_params()  # as a model does when it is built
    except Exception as error:  # each field has a check of its own, with its own exception
        raise CheckpointError(
            f"transformers does not accept the config.json of a {model_type} model: {error}"
        ) from error
    result = read.to_dict()
    result["rope_parameters"].pop("type", None)  # version 4's name of rope_type
    result["rope_parameters"] = _whole_heads(result["rope_parameters"])
    return result


def _whole_heads(rope: dict[str, Any]) -> dict[str, Any]:
    """Return the settings without the statement that heads are rotated as a whole."""
    if rope.get("partial_rotary_factor") != 1:
        return rope
    return {key: value for key, value in rope.items() if key != "partial_rotary_factor"}


def read_source_config(folder: Path) -> dict[str, Any]:
    """Return the parsed ``config.json`` of the source model."""
    return parse_json((folder / "config.json").read_text(encoding="utf-8"))
