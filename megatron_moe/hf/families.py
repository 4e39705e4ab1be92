"""List the families that a run can start from, one row each: what distinguishes it from Llama.

`docs/extending.md` adds a family step by step. The block must be Llama's: RMSNorm before (or after)
attention and FFN, rotary attention, and SwiGLU. In a MoE family, experts take the place of some
FFNs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Family = Literal[
    "llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3", "granite", "olmo2",
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "glm4_moe",
]  # fmt: skip

Windows = Literal[
    "ignored", "always", "on_request", "all_on_request", "even_on_request",
    "without_rotary_on_request",
]  # fmt: skip
"""Meaning of ``sliding_window`` in a family: none; for every layer; or if ``use_sliding_window`` is
true, for the layers from ``max_window_layers`` on, for all layers, or for every other layer before
``max_window_layers``, or for the layers without rotary embedding."""

DenseLayers = Literal["none", "qwen", "first"]
"""Layers of a MoE family without experts: none; those of ``mlp_only_layers`` and between the
multiples of ``decoder_sparse_step``; or the first ``first_k_dense_replace``."""

_L = "model.layers.{layer}."


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeRow:
    """Keys of config.json that describe the experts of a MoE family, and what is fixed in it."""

    num_experts: tuple[str, ...] = ("num_local_experts", "num_experts")
    """Keys of the number of experts; the first that is there counts. transformers 5 and 4 write
    different ones."""
    expert_size: str = "moe_intermediate_size"
    renormalizes: bool | None = None
    """Whether the weights of the chosen experts sum to one; None if ``norm_topk_prob`` says so."""
    sigmoid: bool = False
    """Whether experts are scored by sigmoid and chosen with a bias, instead of by softmax."""
    dense_layers: DenseLayers = "none"
    shared_size: str | None = None
    """Key of the size of the shared expert, if the family has one."""
    shared_count: str | None = None
    """Key of the size of the shared expert in multiples of ``expert_size``."""
    shared_gate: bool = False
    """Whether a learned gate scales the output of the shared expert."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyRow:
    """One family of models."""

    architecture: str
    """Class of transformers that ``architectures`` in config.json names."""
    defaults: Mapping[str, Any]
    """Defaults of transformers 5 for keys missing in config.json, where they differ from the
    defaults of all families (`spec.COMMON_DEFAULTS`)."""
    qkv_bias: bool | str = False
    """Whether query, key and value have biases, whatever ``attention_bias`` says, or the key that
    says so."""
    qk_layernorm: bool | str = False
    """Whether query and key have an RMSNorm, or the key that says so."""
    qk_norm_spans_heads: bool = False
    """Whether that RMSNorm is over all heads at once instead of over each head."""
    post_norms: bool = False
    """Whether RMSNorm comes after attention and FFN, before their outputs are added to the residual
    stream, instead of before attention and FFN."""
    multipliers: bool = False
    """Whether config.json has Granite's four multipliers (`spec.Multipliers`)."""
    rope_scaling: bool = True
    """Whether transformers scales rotary frequencies in the ways of `hf/rope.py`."""
    skips_rotary: bool = False
    """Whether ``no_rope_layers`` or ``no_rope_layer_interval`` names layers without rotary
    embedding."""
    windows: Windows = "ignored"
    tensors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Tensors whose name differs from Llama's, and the tensors of Llama that they stack by rows.
    ``{layer}`` is the layer's id."""
    moe: MoeRow | None = None
    """The experts; None for a dense family."""


FAMILIES: dict[Family, FamilyRow] = {
    "llama": FamilyRow(
        architecture="LlamaForCausalLM",
        defaults={"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "mistral": FamilyRow(
        architecture="MistralForCausalLM",
        defaults={
            "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096,
            "bos_token_id": 1, "eos_token_id": 2,
        },
        windows="always",
    ),
    "qwen2": FamilyRow(
        architecture="Qwen2ForCausalLM",
        defaults={
            "max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096,
            "max_window_layers": 28,
        },
        qkv_bias=True,
        windows="on_request",
    ),
    "qwen3": FamilyRow(
        architecture="Qwen3ForCausalLM",
        defaults={
            "max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128,
            "sliding_window": 4096, "max_window_layers": 28,
        },
        qk_layernorm=True,
        windows="on_request",
    ),
    "phi3": FamilyRow(
        architecture="Phi3ForCausalLM",
        defaults={
            "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "bos_token_id": 1,
            "eos_token_id": 32000,
        },
        rope_scaling=False,
        windows="always",
        tensors={
            _L + "self_attn.qkv_proj.weight": tuple(
                _L + f"self_attn.{part}_proj.weight" for part in "qkv"
            ),
            _L + "mlp.gate_up_proj.weight": (
                _L + "mlp.gate_proj.weight", _L + "mlp.up_proj.weight",
            ),
        },
    ),
    "smollm3": FamilyRow(
        architecture="SmolLM3ForCausalLM",
        defaults={
            "max_position_embeddings": 32768, "num_key_value_heads": 4, "rope_theta": 2e6,
            "no_rope_layer_interval": 4, "tie_word_embeddings": True, "bos_token_id": 128000,
            "eos_token_id": 128001,
        },
        skips_rotary=True,
        windows="without_rotary_on_request",
    ),
    "granite": FamilyRow(
        architecture="GraniteForCausalLM",
        defaults={
            "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2,
            "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
        multipliers=True,
    ),
    "olmo2": FamilyRow(
        architecture="Olmo2ForCausalLM",
        defaults={
            "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "eos_token_id": 50279,
        },
        qk_layernorm=True,
        qk_norm_spans_heads=True,
        post_norms=True,
    ),
    "mixtral": FamilyRow(
        architecture="MixtralForCausalLM",
        defaults={
            "max_position_embeddings": 131072, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
            "rope_theta": 1e6, "bos_token_id": 1, "eos_token_id": 2, "num_experts_per_tok": 2,
            "num_local_experts": 8,
        },
        windows="always",
        moe=MoeRow(expert_size="intermediate_size", renormalizes=True),
    ),
    "qwen2_moe": FamilyRow(
        architecture="Qwen2MoeForCausalLM",
        defaults={
            "max_position_embeddings": 32768, "num_key_value_heads": 16, "sliding_window": 4096,
            "max_window_layers": 28, "qkv_bias": True, "num_experts_per_tok": 4,
            "num_experts": 60, "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
        qkv_bias="qkv_bias",
        windows="even_on_request",
        moe=MoeRow(
            dense_layers="qwen", shared_size="shared_expert_intermediate_size", shared_gate=True
        ),
    ),
    "qwen3_moe": FamilyRow(
        architecture="Qwen3MoeForCausalLM",
        defaults={
            "max_position_embeddings": 32768, "num_key_value_heads": 4, "sliding_window": 4096,
            "num_experts_per_tok": 8, "num_experts": 128, "moe_intermediate_size": 768,
        },
        qk_layernorm=True,
        windows="all_on_request",
        moe=MoeRow(dense_layers="qwen"),
    ),
    "olmoe": FamilyRow(
        architecture="OlmoeForCausalLM",
        defaults={
            "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "eos_token_id": 50279,
            "num_experts_per_tok": 8, "num_experts": 64,
        },
        qk_layernorm=True,
        qk_norm_spans_heads=True,
        moe=MoeRow(expert_size="intermediate_size"),
    ),
    "flex_olmo": FamilyRow(
        architecture="FlexOlmoForCausalLM",
        defaults={
            "max_position_embeddings": 4096, "rope_theta": 5e5, "eos_token_id": 100257,
            "num_experts_per_tok": 5, "num_experts": 7,
        },
        qk_layernorm=True,
        qk_norm_spans_heads=True,
        post_norms=True,
        moe=MoeRow(expert_size="intermediate_size"),
    ),
    "glm4_moe": FamilyRow(
        architecture="Glm4MoeForCausalLM",
        defaults={
            "max_position_embeddings": 131072, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
            "partial_rotary_factor": 0.5, "num_experts_per_tok": 8, "n_routed_experts": 128,
            "moe_intermediate_size": 1408, "n_shared_experts": 1, "first_k_dense_replace": 1,
            "norm_topk_prob": True,
        },
        qkv_bias="attention_bias",
        qk_layernorm="use_qk_norm",
        moe=MoeRow(
            num_experts=("n_routed_experts", "num_local_experts"), sigmoid=True,
            dense_layers="first", shared_count="n_shared_experts",
        ),
    ),
}  # fmt: skip

FAMILY_OF_ARCHITECTURE: dict[str, Family] = {
    row.architecture: family for family, row in FAMILIES.items()
}

_GEMMA = "GELU in its FFN, norms whose weights are offsets from one, and embeddings times sqrt(D)"
_NO_GATE = "an FFN without a gate, and LayerNorm"
REFUSED: dict[str, str] = {
    "GemmaForCausalLM": _GEMMA,
    "Gemma2ForCausalLM": _GEMMA + ", and caps attention scores and logits by tanh",
    "Gemma3ForCausalLM": _GEMMA + ", and two rotary bases",
    "Gemma3ForConditionalGeneration": _GEMMA + ", two rotary bases, and an image encoder",
    "Olmo3ForCausalLM": "another rotary embedding in layers with a sliding window",
    "DeepseekV2ForCausalLM": "latent attention",
    "DeepseekV3ForCausalLM": "latent attention",
    "OPTForCausalLM": _NO_GATE,
    "GPT2LMHeadModel": _NO_GATE,
    "GPTNeoXForCausalLM": _NO_GATE,
    "PhiForCausalLM": _NO_GATE,
    "FalconForCausalLM": _NO_GATE,
    "BloomForCausalLM": _NO_GATE,
    "Starcoder2ForCausalLM": _NO_GATE,
    "CohereForCausalLM": "LayerNorm, and attention and FFN side by side",
}
"""Architectures that people ask for, and what they have that this package does not build."""
