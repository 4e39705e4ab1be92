"""Translate ``RunConfig`` and the dense model's shape to Megatron-Core's ``TransformerConfig``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_moe.config.moe import Moe
from megatron_moe.config.run import Parallel, RunConfig
from megatron_moe.config.train import Train
from megatron_moe.errors import ConfigError
from megatron_moe.experts.resolve import moe_layer_ids
from megatron_moe.hf.dtypes import OF_PRECISION
from megatron_moe.hf.spec import ModelSpec
from megatron_moe.runtime.engine import Engine


def transformer_config(config: RunConfig, spec: ModelSpec, *, engine: Engine) -> TransformerConfig:
    """Return the configuration of Megatron-Core's model and schedules.

    Args:
        config: The run's configuration, already checked by `rules.check`.
        spec: Shape of the dense model.
        engine: Determines which fused kernels are enabled.
    """
    return TransformerConfig(**transformer_settings(config, spec, engine=engine))


def transformer_settings(config: RunConfig, spec: ModelSpec, *, engine: Engine) -> dict[str, Any]:
    """Return the arguments of ``TransformerConfig``, without constructing it.

    They can be inspected without Transformer Engine, in which case Megatron-Core would reject a
    configuration with fused kernels.
    """
    dtype = OF_PRECISION[config.train.precision]
    return dict(
        **_dense_shape(spec),
        **_moe(config.moe, spec),
        **_parallel(config.parallel),
        **_recompute(config.train.recompute, engine),
        **_kernels(config, engine),
        **_shared_expert_overlap(config.moe, engine),
        **_expert_overlap(config.train, engine),
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        # Divide gradients by the tokens of the global batch, so that every layout agrees.
        calculate_per_token_loss=True,
        # Every parameter is filled from the dense checkpoint, so initialization is not needed.
        perform_initialization=False,
        # Transformer Engine's modules read this instead of torch's default device.
        init_model_with_meta_device=torch.get_default_device().type == "meta",
    )


def _dense_shape(spec: ModelSpec) -> dict[str, Any]:
    return {
        "num_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "ffn_hidden_size": spec.ffn_hidden_size,
        "num_attention_heads": spec.num_attention_heads,
        "num_query_groups": spec.num_query_groups,
        "kv_channels": spec.kv_channels,
        "normalization": "RMSNorm",
        "layernorm_epsilon": spec.layernorm_epsilon,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": spec.qkv_bias,
        "qk_layernorm": spec.qk_layernorm,
        **_softmax(spec),
        **_rotary(spec),
    }


def _softmax(spec: ModelSpec) -> dict[str, Any]:
    """Return the scale of attention's logits, if a multiplier or rotary scaling changes it.

    YaRN multiplies query and key by a factor after rotation, which is the same as multiplying their
    products by its square.
    """
    factor = 1.0 if spec.rope_scaling is None else spec.rope_scaling.attention_factor
    scale = spec.multipliers.attention
    if factor == 1.0 and scale is None:
        return {}
    return {"softmax_scale": factor**2 * (spec.kv_channels**-0.5 if scale is None else scale)}


def _rotary(spec: ModelSpec) -> dict[str, Any]:
    """Return which layers skip rotary embedding, if some do."""
    if not spec.layers_without_rotary:
        return {}
    skipped = (layer in spec.layers_without_rotary for layer in range(spec.num_layers))
    return {"no_rope_freq": list(map(int, skipped))}


def _moe(moe: Moe, spec: ModelSpec) -> dict[str, Any]:
    layers = moe_layer_ids(moe, spec.num_layers)
    own_loss = moe.moe_router_load_balancing_type == "cv_squared"  # computed by the noisy router
    return {
        "num_moe_experts": moe.num_moe_experts,
        "moe_router_topk": moe.moe_router_topk,
        "moe_ffn_hidden_size": moe.expert_size(spec.ffn_hidden_size),
        "moe_shared_expert_intermediate_size": moe.moe_shared_expert_intermediate_size,
        **({"moe_shared_expert_gate": True} if moe.moe_shared_expert_gate else {}),
        **({"moe_enable_routing_replay": True} if moe.records_or_replays else {}),
        "moe_layer_freq": [int(layer in layers) for layer in range(spec.num_layers)],
        # Megatron-Core refuses a top-1 otherwise; with a single expert both orders give 1.
        "moe_router_pre_softmax": moe.router_order == "softmax_topk" or moe.num_moe_experts == 1,
        "moe_router_dtype": "fp32",
        "moe_router_score_function": moe.moe_router_score_function,
        "moe_router_load_balancing_type": "none"
        if own_loss
        else moe.moe_router_load_balancing_type,
        "moe_aux_loss_coeff": moe.moe_aux_loss_coeff,
        "moe_z_loss_coeff": moe.moe_z_loss_coeff or None,
        "moe_router_enable_expert_bias": moe.moe_router_enable_expert_bias,
        "moe_router_bias_update_rate": moe.moe_router_bias_update_rate,
        "moe_expert_capacity_factor": moe.megatron_capacity_factor,
        "moe_pad_expert_input_to_capacity": moe.moe_pad_expert_input_to_capacity,
        "moe_token_drop_policy": moe.moe_token_drop_policy,
        "moe_token_dispatcher_type": moe.moe_token_dispatcher_type,
        "moe_flex_dispatcher_backend": moe.moe_flex_dispatcher_backend,
    }


def _parallel(parallel: Parallel) -> dict[str, Any]:
    vpp, layout = (
        parallel.virtual_pipeline_parallel_size or 1,
        parallel.pipeline_model_parallel_layout,
    )
    return {
        # A stage's output is freed once it is sent, because the backward pass needs only its shape.
        "deallocate_pipeline_outputs": True,
        "tensor_model_parallel_size": parallel.tensor_parallel_size,
        "context_parallel_size": parallel.context_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_parallel_size,
        "virtual_pipeline_model_parallel_size": vpp if vpp > 1 else None,
        "num_layers_in_first_pipeline_stage": parallel.num_layers_in_first_pipeline_stage,
        "num_layers_in_last_pipeline_stage": parallel.num_layers_in_last_pipeline_stage,
        **({} if layout is None else {"pipeline_model_parallel_layout": layout}),
        "expert_model_parallel_size": parallel.expert_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_parallel_size,
        "sequence_parallel": parallel.tensor_parallel_size > 1,
        # Batched sends and receives between the same two ranks (pp 2, vpp > 1) are matched in the
        # wrong order, and gradients explode without an error. Single ones are correct and overlap.
        "batch_p2p_comm": vpp == 1,
        "overlap_p2p_comm": vpp > 1,
    }


_RECOMPUTED = {
    ("torch", "cpu"): {"selective": ["core_attn"], "moe": ["moe"]},
    # No "layernorm": Megatron-Core recomputes norms only with Transformer Engine. No "selective":
    # torch-native experts always recompute their activations.
    ("torch", "cuda"): {"moe": ["moe"]},
    ("transformer_engine", "cuda"): {
        "selective": ["layernorm", "moe_act"],
        "moe": ["layernorm", "moe"],
    },
}
"""Modules that the backward pass recomputes, by engine, device and `train.recompute`."""


def _recompute(what: str, engine: Engine) -> dict[str, Any]:
    """Translate `train.recompute` to Megatron-Core's settings."""
    if what == "none":
        return {}
    if what == "full":
        one_layer = {"recompute_method": "uniform", "recompute_num_layers": 1}
        return {"recompute_granularity": "full", **one_layer}
    modules = _RECOMPUTED[engine.name, engine.device][what]
    return {"recompute_granularity": "selective", "recompute_modules": modules}


def _kernels(config: RunConfig, engine: Engine) -> dict[str, Any]:
    """Return the settings that choose kernels."""
    train = config.train
    if engine.is_torch:
        return {
            "use_cpu_initialization": not engine.on_cuda,
            # `train.state` enables it for models that have gradient buffers.
            "gradient_accumulation_fusion": False,
            "bias_activation_fusion": engine.on_cuda,  # Megatron-Core compiles it
            "moe_grouped_gemm": False,
        }
    # Settings that Megatron-Core's MoE guide recommends for H100.
    return {
        "use_cpu_initialization": False,
        "gradient_accumulation_fusion": train.gradient_accumulation_fusion,
        "tp_comm_overlap": train.tp_comm_overlap,
        "bias_activation_fusion": True,
        "apply_rope_fusion": True,
        "moe_grouped_gemm": True,
        "moe_permute_fusion": True,
        # The fused kernel chooses experts itself, so it can neither record nor replay.
        "moe_router_fusion": not config.moe.records_or_replays,
        **({} if train.fp8 is None else {"fp8": train.fp8, "fp8_recipe": train.fp8_recipe}),
    }


def _shared_expert_overlap(moe: Moe, engine: Engine) -> dict[str, Any]:
    """Return the setting that overlaps the shared expert; a model on a CPU computes the same."""
    if not (moe.moe_shared_expert_overlap and engine.on_cuda):
        return {}
    return {"moe_shared_expert_overlap": True}


def _expert_overlap(train: Train, engine: Engine) -> dict[str, Any]:
    """Return the settings that overlap the exchange of tokens with another micro-batch."""
    if not train.overlap_moe_expert_parallel_comm:
        return {}
    delayed = train.delay_wgrad_compute and not engine.is_torch
    return {
        "overlap_moe_expert_parallel_comm": True,
        **({"delay_wgrad_compute": True} if delayed else {}),
    }


@contextmanager
def without_fp8(transformer: TransformerConfig) -> Iterator[None]:
    """Compute products in bf16 inside a ``with`` block; layers read the setting in each pass."""
    fp8, transformer.fp8 = transformer.fp8, None
    try:
        yield
    finally:
        transformer.fp8 = fp8


def check_engine(config: RunConfig, engine: Engine) -> None:
    """Reject settings of training that the chosen engine would ignore.

    Raises:
        ConfigError: The message names the setting and the engine.
    """
    train = config.train
    for name, value, supported, needed in (
        ("train.fp8", train.fp8, not engine.is_torch, "Transformer Engine"),
        ("train.tp_comm_overlap", train.tp_comm_overlap, not engine.is_torch, "Transformer Engine"),
        ("train.delay_wgrad_compute", train.delay_wgrad_compute, not engine.is_torch,
         "Transformer Engine"),
        ("moe.moe_shared_expert_overlap", config.moe.moe_shared_expert_overlap, engine.on_cuda,
         "a GPU"),
    ):  # fmt: skip
        if value and not supported:
            raise ConfigError(
                f"{name} ({value}) needs {needed}, but this run uses the engine {engine.name} on "
                f"{engine.device} ({engine.reason}).\n  leave {name} unset"
            )


def check_dispatcher(moe: Moe, engine: Engine) -> None:
    """Reject a dispatcher whose kernels are not installed.

    Raises:
        ConfigError: The message names what is missing.
    """
    if moe.moe_token_dispatcher_type != "flex":
        return
    # The package deep_ep provides both backends.
    missing = "the package deep_ep" if engine.on_cuda else "a CUDA device"
    if not engine.on_cuda or find_spec("deep_ep") is None:
        raise ConfigError(
            f"moe.moe_token_dispatcher_type (flex) with moe.moe_flex_dispatcher_backend "
            f"({moe.moe_flex_dispatcher_backend}) needs {missing}, which is not available.\n"
            "  set moe.moe_token_dispatcher_type=alltoall"
        )
