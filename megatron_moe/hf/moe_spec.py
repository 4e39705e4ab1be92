"""Read the MoE layers of a Hugging Face model from its ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_moe.hf.families import MoeRow


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsSpec:
    """MoE layers of a source model; fields are named as the settings of ``moe``."""

    num_moe_experts: int
    moe_router_topk: int
    moe_ffn_hidden_size: int
    router_order: Literal["topk_softmax", "softmax_topk"]
    moe_layers: tuple[int, ...]
    moe_router_score_function: Literal["softmax", "sigmoid"] = "softmax"
    moe_router_enable_expert_bias: bool = False
    moe_shared_expert_intermediate_size: int | None = None
    moe_shared_expert_gate: bool = False

    @property
    def shared_size(self) -> int:
        """Number of neurons of the shared expert, 0 without one."""
        return self.moe_shared_expert_intermediate_size or 0


def read_experts(config: Mapping[str, Any], row: MoeRow) -> ExpertsSpec:
    """Return the MoE layers of a config.json that `unsupported_experts` accepts.

    Args:
        config: Parsed config.json, with the family's defaults.
        row: The family's keys.
    """
    shared = _shared_size(config, row) or None
    topk = config["num_experts_per_tok"]
    renormalizes = config.get("norm_topk_prob") if row.renormalizes is None else row.renormalizes
    return ExpertsSpec(
        num_moe_experts=config[_count_key(config, row)],
        moe_router_topk=topk,
        moe_ffn_hidden_size=config[row.expert_size],
        router_order="topk_softmax" if renormalizes or row.sigmoid else "softmax_topk",
        moe_layers=_moe_layers(config, row),
        moe_router_score_function="sigmoid" if row.sigmoid else "softmax",
        moe_router_enable_expert_bias=row.sigmoid,
        moe_shared_expert_intermediate_size=shared,
        moe_shared_expert_gate=row.shared_gate and shared is not None,
    )


def expert_sizes(config: Mapping[str, Any], row: MoeRow) -> list[str]:
    """Return the keys of config.json that must be positive integers."""
    return [_count_key(config, row), "num_experts_per_tok", row.expert_size]


def unsupported_experts(config: Mapping[str, Any], row: MoeRow) -> list[str]:
    """Return reasons for experts that this package does not build; sizes are positive integers."""
    count, topk = config[_count_key(config, row)], config["num_experts_per_tok"]
    reasons = []
    if topk > count:
        reasons.append(
            f"num_experts_per_tok ({topk}) must be at most {_count_key(config, row)} ({count})"
        )
    for key in (row.shared_size, row.shared_count):
        value = config.get(key, 0) if key else 0
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            reasons.append(f"{key} is {value!r}: must be an integer of at least 0")
    for key in ("decoder_sparse_step", "first_k_dense_replace"):
        value = config.get(key, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            reasons.append(f"{key} is {value!r}: must be an integer of at least 0")
    if reasons:
        return reasons
    if not _moe_layers(config, row):
        reasons.append("no layer has experts: a dense family describes such a model")
    reasons += [
        f"{key} is {config[key]}: must be 1, tokens choose among all experts"
        for key in ("n_group", "topk_group")
        if row.sigmoid and config.get(key, 1) != 1
    ]
    if row.sigmoid and (factor := config.get("routed_scaling_factor", 1.0)) != 1:
        reasons.append(f"routed_scaling_factor is {factor}: must be 1; fold it into down_proj")
    if row.sigmoid and bool(config.get("norm_topk_prob")) != (topk > 1):
        reasons.append(
            f"norm_topk_prob is {config.get('norm_topk_prob')} with num_experts_per_tok {topk}: "
            "the weights of several experts must sum to one, and that of a single one is its score"
        )
    if row.renormalizes is None and topk == 1 and config.get("norm_topk_prob") and not row.sigmoid:
        reasons.append("norm_topk_prob is true with num_experts_per_tok 1: the weight is always 1")
    if config.get("clip_qkv") is not None:
        reasons.append(f"clip_qkv is {config['clip_qkv']}: must be null, attention does not clip")
    return reasons


def _count_key(config: Mapping[str, Any], row: MoeRow) -> str:
    return next((key for key in row.num_experts if key in config), row.num_experts[-1])


def _shared_size(config: Mapping[str, Any], row: MoeRow) -> int:
    if row.shared_count is not None:
        return config[row.shared_count] * config[row.expert_size]
    return config[row.shared_size] if row.shared_size is not None else 0


def _moe_layers(config: Mapping[str, Any], row: MoeRow) -> tuple[int, ...]:
    layers = range(config["num_hidden_layers"])
    match row.dense_layers:
        case "none":
            return tuple(layers)
        case "first":
            return tuple(layers[config["first_k_dense_replace"] :])
        case "qwen":
            every, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
            return tuple(i for i in layers if i not in dense and every and (i + 1) % every == 0)
