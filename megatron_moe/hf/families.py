"""List the dense families that can be upcycled, one row each: what distinguishes it from Llama.

`docs/extending.md` adds a family step by step. The block must be Llama's: RMSNorm before attention
and FFN, rotary attention, and SwiGLU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Family = Literal["llama", "mistral", "qwen2", "qwen3", "phi3"]

Windows = Literal["ignored", "always", "on_request"]
"""Meaning of ``sliding_window`` in a family: none, for every layer, or for some layers if
``use_sliding_window`` is true."""

_L = "model.layers.{layer}."


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyRow:
    """One dense family."""

    architecture: str
    """Class of transformers that ``architectures`` in config.json names."""
    defaults: Mapping[str, Any]
    """Defaults of transformers 5 for keys missing in config.json, where they differ from the
    defaults of all families (`spec.COMMON_DEFAULTS`)."""
    qkv_bias: bool = False
    """Whether query, key and value have biases, whatever ``attention_bias`` says."""
    qk_layernorm: bool = False
    """Whether each head of query and key has an RMSNorm."""
    rope_scaling: bool = True
    """Whether transformers scales rotary frequencies in the ways of `hf/rope.py`."""
    windows: Windows = "ignored"
    tensors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Tensors whose name differs from Llama's, and the tensors of Llama that they stack by rows.
    ``{layer}`` is the layer's id."""


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
}  # fmt: skip

FAMILY_OF_ARCHITECTURE: dict[str, Family] = {
    row.architecture: family for family, row in FAMILIES.items()
}
