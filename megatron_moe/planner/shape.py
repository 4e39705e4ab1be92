"""Sizes of an MoE model that the planner's arithmetic needs.

Shape letters of this folder:

    D  hidden_size        H  num_attention_heads   E  num_moe_experts
    F  ffn_hidden_size    G  num_query_groups      K  moe_router_topk
    V  vocab_size         L  num_layers            M  moe_ffn_hidden_size
    S  sequence length    B  micro-batch size      T  tokens = S * B
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from megatron_moe.config.moe import Moe
from megatron_moe.config.parts import Frozen, Role
from megatron_moe.config.run import RunConfig
from megatron_moe.experts.from_source import settings_of
from megatron_moe.experts.resolve import moe_layer_ids
from megatron_moe.hf.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeShape:
    """Sizes of a Llama-family model, some of whose layers have experts instead of a dense FFN.

    A dense model has no MoE layers.
    """

    num_layers: int
    moe_layers: frozenset[int]
    """Ids of the MoE layers; the others have the dense FFN."""
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    tied_embeddings: bool = False
    qkv_bias: bool = False
    qk_layernorm: bool = False
    qk_norm_spans_heads: bool = False
    """Whether the norms of query and key have a weight for each head, which tp ranks share."""
    post_norms: bool = False
    """Whether norms come after attention and FFN instead of before them."""
    num_moe_experts: int = 1
    moe_router_topk: int = 1
    moe_ffn_hidden_size: int = 0
    shared_expert_size: int = 0
    """Neurons of the shared expert of each MoE layer; 0 if there is none."""
    shared_expert_gate: bool = False
    """Whether the shared expert has a learned scalar gate (Qwen2-MoE)."""
    router_gate: str = "linear"
    """The router's network, one of the values of `Moe.router_gate`."""
    lora_rank: int = 0
    """Rank of the adapters (R); 0 if there are none."""
    lora_targets: tuple[Role, ...] = ()
    """Roles whose matrices have adapters."""

    @property
    def query_width(self) -> int:
        """Width of the queries of all heads, H * kv_channels."""
        return self.num_attention_heads * self.kv_channels

    @property
    def kv_width(self) -> int:
        """Width of the keys (or values) of all groups, G * kv_channels."""
        return self.num_query_groups * self.kv_channels

    def kv_width_of_rank(self, tp: int) -> int:
        """Return the width of the keys (or values) that a tp rank attends to: at least one head."""
        return max(self.kv_width // tp, self.kv_channels)

    def qk_norm_sizes(self, tp: int) -> tuple[int, int]:
        """Return the parameters of a layer's norms of query and key on one of ``tp`` ranks."""
        if self.qk_norm_spans_heads:
            return self.query_width // tp, self.kv_width // tp
        return self.kv_channels * self.qk_layernorm, self.kv_channels * self.qk_layernorm

    def adapter_rank(self, role: Role) -> int:
        """Return the rank of the adapters of a role's matrices; 0 if they have none."""
        return self.lora_rank if role in self.lora_targets else 0

    @property
    def router_sizes(self) -> dict[str, int]:
        """Number of parameters of one router, by name."""
        rows, experts = self.num_moe_experts * self.hidden_size, self.num_moe_experts
        noisy, mlp = self.router_gate.startswith("noisy_"), self.router_gate == "noisy_mlp"
        return {
            "weight": rows,
            "noise_weight": rows * noisy,
            "output_weight": experts * experts * mlp,
        }

    def layers_with(self, role: Role) -> Collection[int]:
        """Return the layers that have parameters of a role."""
        match role:
            case "embeddings":
                return ()
            case "adapters":
                return sorted({n for target in self.lora_targets for n in self.layers_with(target)})
            case "attention" | "norms":
                return range(self.num_layers)
            case "dense_ffn":
                return [layer for layer in range(self.num_layers) if layer not in self.moe_layers]
            case "shared_experts" if not self.shared_expert_size:
                return ()
            case _:
                return self.moe_layers

    def trained_layers(self, role: Role, frozen: Frozen) -> int:
        """Return the number of layers in which the parameters of a role are trained."""
        return frozen.trained(role, self.layers_with(role))

    def trained_share(self, role: Role, frozen: Frozen) -> float:
        """Return the fraction of a role's layers in which it is trained; 1 if it has none."""
        layers = self.layers_with(role)
        return frozen.trained(role, layers) / len(layers) if layers else 1.0

    @property
    def num_moe_layers(self) -> int:
        """Number of MoE layers."""
        return len(self.moe_layers)

    @property
    def num_dense_layers(self) -> int:
        """Number of layers that keep the dense FFN."""
        return self.num_layers - len(self.moe_layers)


def dense_shape(spec: ModelSpec) -> MoeShape:
    """Return the shape of the dense model, without MoE layers."""
    return MoeShape(moe_layers=frozenset(), **_attention_of(spec))


def source_shape(spec: ModelSpec) -> MoeShape:
    """Return the shape of the source itself, dense or MoE."""
    if spec.experts is None:
        return dense_shape(spec)
    return upcycled_shape(spec, Moe(**settings_of(spec.experts, spec.num_layers)))


def upcycled_shape(spec: ModelSpec, moe: Moe) -> MoeShape:
    """Return the shape of the model that upcycling ``spec`` with ``moe`` produces."""
    return MoeShape(
        moe_layers=frozenset(moe_layer_ids(moe, spec.num_layers)),
        num_moe_experts=moe.num_moe_experts,
        moe_router_topk=moe.moe_router_topk,
        moe_ffn_hidden_size=moe.expert_size(spec.ffn_hidden_size),
        shared_expert_size=moe.shared_size,
        shared_expert_gate=moe.moe_shared_expert_gate,
        router_gate=moe.router_gate,
        **_attention_of(spec),
    )


def run_shape(config: RunConfig, spec: ModelSpec) -> MoeShape:
    """Return the shape of the model that a run trains, with its adapters."""
    lora = config.lora
    targets = tuple(sorted(lora.frozen))
    return replace(upcycled_shape(spec, config.moe), lora_rank=lora.rank, lora_targets=targets)


def _attention_of(spec: ModelSpec) -> dict[str, Any]:
    names = (
        "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
        "kv_channels", "vocab_size", "tied_embeddings", "qkv_bias", "qk_layernorm",
        "qk_norm_spans_heads", "post_norms",
    )  # fmt: skip
    return {name: getattr(spec, name) for name in names}
