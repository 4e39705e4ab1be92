"""Build layer specs from Megatron-Core's modules.

The run's engine selects torch-native or Transformer Engine modules. Both write checkpoints under
the same keys (those of Transformer Engine), so that a run can switch between them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_moe.config.train import Lora
from megatron_moe.hf.spec import ModelSpec
from megatron_moe.model.attention import SdpaAttention
from megatron_moe.model.experts import LoopExperts
from megatron_moe.model.grouped_experts import GroupedExperts
from megatron_moe.model.lora import adapted
from megatron_moe.model.lora_experts import AdaptedExperts
from megatron_moe.model.norm import RMSNorm
from megatron_moe.model.residual import with_residual_adds
from megatron_moe.runtime.engine import Engine

QkNorms = tuple[Any, Any]
"""Builders of the norms of query and key, with the arguments of `RMSNorm`."""


def block_spec(
    config: TransformerConfig,
    spec: ModelSpec,
    layers: range,
    *,
    router: Any,
    engine: Engine,
    vp_stage: int | None,
    qk_norms: QkNorms | None = None,
    lora: Lora | None = None,
) -> TransformerBlockSubmodules:
    """Return the layer specs of one model chunk.

    Args:
        config: Configuration; ``moe_layer_freq`` selects the MoE layers.
        spec: Shape of the source model.
        layers: Global ids of the chunk's layers.
        router: Factory of a layer's router, with the arguments of Megatron-Core's TopKRouter.
        engine: Implementation of the layers.
        vp_stage: Index of this chunk on its pipeline rank; None if there is only one.
        qk_norms: Builders of the norms of query and key; None for the usual ones.
        lora: Adapters of the layers; None for none.
    """
    block = _block_spec(
        config, spec, layers, router=router, engine=engine, vp_stage=vp_stage, qk_norms=qk_norms
    )
    if lora is not None and lora.rank:
        _add_adapters(block, lora, fused=not (engine.is_torch or spec.post_norms))
    return block


def _add_adapters(block: TransformerBlockSubmodules, lora: Lora, *, fused: bool) -> None:
    """Add adapters to the targets in the block's layers.

    Args:
        block: Layer specs of a chunk.
        lora: The adapters.
        fused: Whether the projection of query, key and value contains the norm before it.
    """
    layers: Any = block.layer_specs
    if fused and "attention" in lora.targets:
        _separate_norms(block)
    specs = {id(layer): layer.submodules for layer in layers}  # layers may share a spec
    for parts in specs.values():
        attention = parts.self_attention.submodules
        if "attention" in lora.targets:
            attention.linear_qkv = adapted(attention.linear_qkv, lora, axis=0)
            attention.linear_proj = adapted(attention.linear_proj, lora, axis=1)
        if "experts" in lora.targets and parts.mlp.func is MoELayer:
            linear = MLPSubmodules(
                linear_fc1=adapted(ColumnParallelLinear, lora, axis=0),
                linear_fc2=adapted(RowParallelLinear, lora, axis=1),
            )
            experts = partial(AdaptedExperts, submodules=linear)
            submodules = replace(parts.mlp.keywords["submodules"], experts=experts)
            parts.mlp = partial(MoELayer, submodules=submodules)


def _separate_norms(block: TransformerBlockSubmodules) -> None:
    """Separate the norm before attention from the projection: an adapter needs its output, too."""
    from megatron.core.extensions.transformer_engine import TENorm

    layers: Any = block.layer_specs
    for layer in layers:
        parts = layer.submodules
        parts.input_layernorm = TENorm
        parts.self_attention.submodules.linear_qkv = _linear_without_norm()
        keys = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
        parts.sharded_state_dict_keys_map = {**parts.sharded_state_dict_keys_map, **keys}


def _block_spec(
    config: TransformerConfig,
    spec: ModelSpec,
    layers: range,
    *,
    router: Any,
    engine: Engine,
    vp_stage: int | None,
    qk_norms: QkNorms | None,
) -> TransformerBlockSubmodules:
    """Return the layer specs of one model chunk without adapters."""
    if not engine.is_torch:
        block = get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
        block = _with_qk_norms(qk_norms, _with_router(router, block))
        return with_residual_adds(block, config, spec, linear=_linear_without_norm())
    is_moe: Any = config.moe_layer_freq
    block = TransformerBlockSubmodules(
        layer_specs=[_layer(config, router if is_moe[layer] else None, engine) for layer in layers],
        layer_norm=RMSNorm,
    )
    return with_residual_adds(_with_qk_norms(qk_norms, block), config, spec)


def _linear_without_norm() -> Any:
    """Return Transformer Engine's column-parallel layer."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

    return TEColumnParallelLinear


def _layer(config: TransformerConfig, router: Any, engine: Engine) -> ModuleSpec:
    """Return the spec of one layer, which is a MoE layer if ``router`` is not None."""
    qk_norm = RMSNorm if config.qk_layernorm else IdentityOp
    # Megatron-Core declares narrower types for these slots than it accepts.
    core_attention: Any = SdpaAttention
    bias_dropout_add: Any = get_bias_dropout_add
    keys = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if router is None:
        keys["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=core_attention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=(
                partial(MLP.as_mlp_submodule, submodules=_LINEAR)
                if router is None
                else _moe_mlp(router, engine)
            ),
            mlp_bda=bias_dropout_add,
            sharded_state_dict_keys_map=keys,
        ),
    )


def _moe_mlp(router: Any, engine: Engine) -> partial[MoELayer]:
    experts = GroupedExperts if engine.on_cuda else LoopExperts
    submodules = MoESubmodules(
        experts=partial(experts, submodules=_LINEAR),
        shared_experts=partial(SharedExpertMLP, submodules=_LINEAR),
        router=router,
    )
    return partial(MoELayer, submodules=submodules)


def _with_router(router: Any, block: TransformerBlockSubmodules) -> TransformerBlockSubmodules:
    """Replace the router in the block's MoE layers."""
    layers: Any = block.layer_specs
    for layer in layers:
        mlp = layer.submodules.mlp
        if isinstance(mlp, partial) and mlp.func is MoELayer:
            submodules = replace(mlp.keywords["submodules"], router=router)
            layer.submodules = replace(
                layer.submodules, mlp=partial(MoELayer, submodules=submodules)
            )
    return block


def _with_qk_norms(
    norms: QkNorms | None, block: TransformerBlockSubmodules
) -> TransformerBlockSubmodules:
    """Replace the norms of query and key in the block's layers, unless ``norms`` is None."""
    layers: Any = block.layer_specs
    if norms is None:
        return block
    for layer in layers:
        attention = layer.submodules.self_attention
        attention.submodules = replace(
            attention.submodules, q_layernorm=norms[0], k_layernorm=norms[1]
        )
    return block


_LINEAR = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
