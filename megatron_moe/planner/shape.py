"""The numbers of an MoE model that the arithmetic needs, wherever they come from.

Shape letters of this folder:

    D  hidden_size        H  num_attention_heads   E  num_moe_experts
    F  ffn_hidden_size    G  num_query_groups      K  moe_router_topk
    V  vocab_size         L  num_layers            M  moe_ffn_hidden_size
    S  sequence length    B  micro-batch size      T  tokens = S * B
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_moe.config.run import Moe
from megatron_moe.experts.recipe import moe_layer_ids
from megatron_moe.hf.spec import DenseSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeShape:
    """Sizes of a Llama-family model whose FFNs are, in some layers, experts.

    A dense model is one without MoE layers.
    """

    num_layers: int
    moe_layers: frozenset[int]
    """Ids of the layers that route; the others hold the dense FFN."""
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    tied_embeddings: bool = False
    qkv_bias: bool = False
    qk_layernorm: bool = False
    num_moe_experts: int = 1
    moe_router_topk: int = 1
    moe_ffn_hidden_size: int = 0
    shared_expert_size: int = 0
    """Neurons of the always-on expert of each MoE layer; 0: there is none."""
    shared_expert_gate: bool = False
    """A learned scalar gate on the shared expert (Qwen2-MoE)."""
    router_gate: str = "linear"
    """The router's network, as `Moe.router_gate` names it."""

    @property
    def query_width(self) -> int:
        """Columns of all heads' queries, H * kv_channels."""
        return self.num_attention_heads * self.kv_channels

    @property
    def kv_width(self) -> int:
        """Columns of all groups' keys (or values), G * kv_channels."""
        return self.num_query_groups * self.kv_channels

    @property
    def router_sizes(self) -> dict[str, int]:
        """Parameters of one router, by name."""
        rows, experts = self.num_moe_experts * self.hidden_size, self.num_moe_experts
        noisy, mlp = self.router_gate != "linear", self.router_gate == "noisy_mlp"
        return {
            "weight": rows,
            "noise_weight": rows * noisy,
            "output_weight": experts * experts * mlp,
        }

    @property
    def num_moe_layers(self) -> int:
        """Layers that route."""
        return len(self.moe_layers)

    @property
    def num_dense_layers(self) -> int:
        """Layers that keep the dense FFN."""
        return self.num_layers - len(self.moe_layers)


def dense_shape(spec: DenseSpec) -> MoeShape:
    """The dense model itself: no layer routes."""
    return MoeShape(moe_layers=frozenset(), **_attention_of(spec))


def upcycled_shape(spec: DenseSpec, moe: Moe) -> MoeShape:
    """What upcycling ``spec`` as ``moe`` says ends in."""
    return MoeShape(
        moe_layers=frozenset(moe_layer_ids(moe, spec.num_layers)),
        num_moe_experts=moe.num_moe_experts,
        moe_router_topk=moe.moe_router_topk,
        moe_ffn_hidden_size=moe.moe_ffn_hidden_size or spec.ffn_hidden_size,
        shared_expert_size=moe.moe_shared_expert_intermediate_size or 0,
        router_gate=moe.router_gate,
        **_attention_of(spec),
    )


def _attention_of(spec: DenseSpec) -> dict[str, Any]:
    names = (
        "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
        "kv_channels", "vocab_size", "tied_embeddings", "qkv_bias", "qk_layernorm",
    )  # fmt: skip
    return {name: getattr(spec, name) for name in names}
