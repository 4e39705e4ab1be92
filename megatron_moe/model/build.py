"""Build this rank's part of the model, with uninitialized parameters."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_moe.config.run import RunConfig
from megatron_moe.hf.spec import ModelSpec
from megatron_moe.model.config import transformer_config
from megatron_moe.model.grouped_experts import lay_out_experts
from megatron_moe.model.norm import HeadsRMSNorm
from megatron_moe.model.residual import multiply_ends
from megatron_moe.model.rope import scaled_frequencies
from megatron_moe.model.routers import router_factory
from megatron_moe.model.spec import QkNorms, block_spec
from megatron_moe.parallel.layout import ParallelLayout, split_of
from megatron_moe.parallel.shards import padded_vocabulary
from megatron_moe.parallel.stages import chunk_layers, is_first, is_last
from megatron_moe.runtime.engine import Engine


@dataclass(frozen=True, slots=True)
class Chunk:
    """One model chunk of a pipeline rank, and the global ids of its layers."""

    module: GPTModel
    layers: range


@dataclass(frozen=True, slots=True)
class Model:
    """Model chunks of one rank, and Megatron-Core's configuration of the whole model."""

    chunks: tuple[Chunk, ...]
    transformer: TransformerConfig
    spec: ModelSpec
    tp_rank: int
    engine: Engine

    @property
    def modules(self) -> list[GPTModel]:
        """The chunks' modules, as Megatron-Core's schedules expect them."""
        return [chunk.module for chunk in self.chunks]

    @property
    def device(self) -> torch.device:
        """Device of this rank's parameters."""
        return next(self.modules[0].parameters()).device


def _qk_norms(spec: ModelSpec, groups: ProcessGroupCollection) -> QkNorms | None:
    if not spec.qk_norm_spans_heads:
        return None
    query, key = (
        partial(HeadsRMSNorm, heads=heads, tp_group=groups.tp)
        for heads in (spec.num_attention_heads, spec.num_query_groups)
    )
    return query, key


def _complete(module: GPTModel, spec: ModelSpec) -> None:
    """Lay out the experts of a chunk, and add what Megatron-Core's model lacks."""
    lay_out_experts([module])
    multiply_ends(module, spec.multipliers)
    if spec.rope_scaling is not None:
        rotary = module.rotary_pos_emb
        rotary.inv_freq = scaled_frequencies(
            rotary.inv_freq, spec.rope_scaling, base=spec.rotary_base
        )


def build_model(
    config: RunConfig,
    spec: ModelSpec,
    *,
    layout: ParallelLayout,
    groups: ProcessGroupCollection,
    rank: int,
    engine: Engine,
) -> Model:
    """Build this rank's chunks; parameters are allocated but not initialized.

    Args:
        config: The run's configuration.
        spec: Shape of the dense model.
        layout: Parallel layout of the run.
        groups: This rank's process groups.
        rank: This rank.
        engine: Implementation of the layers, and their device.
    """
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)
    transformer = transformer_config(config, spec, engine=engine)
    router = router_factory(config)
    pp, vpp = layout.attention.size("pp"), transformer.virtual_pipeline_model_parallel_size or 1
    chunks = []
    for vpp_rank in range(vpp):
        stage = {"pp_rank": layout.attention.coords(rank)["pp"], "vpp_rank": vpp_rank}
        layers = chunk_layers(
            num_layers=spec.num_layers, pp=pp, vpp=vpp, split=split_of(config.parallel), **stage
        )
        vp_stage = vpp_rank if vpp > 1 else None
        spec_of_layers: Any = block_spec(
            transformer, spec, layers, router=router, engine=engine, vp_stage=vp_stage,
            qk_norms=_qk_norms(spec, groups), lora=config.lora,
        )  # fmt: skip
        rotary_base: Any = spec.rotary_base  # declared int by Megatron-Core, but any number works
        module = GPTModel(
            config=transformer,
            transformer_layer_spec=spec_of_layers,
            vocab_size=padded_vocabulary(spec.vocab_size, layout.attention.size("tp")),
            max_sequence_length=config.data.seq_length,
            pre_process=is_first(**stage),
            post_process=is_last(pp=pp, vpp=vpp, **stage),
            share_embeddings_and_output_weights=spec.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=rotary_base,
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        # Megatron-Core allocates routers and torch-native norms on the CPU and expects a move.
        if not transformer.init_model_with_meta_device:
            module.to(torch.cuda.current_device())
        _complete(module, spec)
        chunks.append(Chunk(module, layers))
    if spec.qk_norm_spans_heads:
        # If this is true, Megatron-Core sums the gradients of all parameters called q_layernorm or
        # k_layernorm over tp. Each rank has the weights of other heads here.
        transformer.qk_layernorm = False
    tp_rank = layout.attention.coords(rank)["tp"]
    return Model(tuple(chunks), transformer, spec, tp_rank, engine)
