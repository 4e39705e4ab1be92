"""Complete Megatron-Core's Muon: fused matrices, fp32 runs, and masters of bf16 weights.

Muon replaces the momentum of a matrix by the nearest orthogonal matrix, by Newton-Schulz steps.
Megatron-Core 0.19 does so for each expert and for query, key and value separately, but
* orthogonalizes gate and up, which one matrix of ours holds, as one matrix;
* forgets on fp32 master weights which of them are fused, and which are experts';
* shards optimizer state over dp (its layer-wise optimizer) for bf16 weights only.
"""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.optimizer.optimizer import FP32Optimizer, MegatronOptimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_moe.hf.names import Sharding, match
from megatron_moe.model.build import Model

_MARKS = ("is_qkv", "qkv_split_shapes", "expert_tp")
"""Attributes of a parameter by which Megatron-Core's Muon knows what it consists of."""


def mark_fused(model: Model) -> None:
    """Mark matrices of gate and up, so that each of the two is orthogonalized on its own.

    Megatron-Core marks those of query, key and value in the same way.
    """
    for module in model.modules:
        for name, parameter in module.named_parameters():
            parsed = match(name)
            if parsed is not None and parsed.row.sharding is Sharding.GATED:
                fused: Any = parameter
                fused.is_qkv, fused.qkv_split_shapes = True, [len(parameter) // 2] * 2


def shards_by_matrix(groups: ProcessGroupCollection) -> bool:
    """Return whether Megatron-Core's layer-wise optimizer can shard the state over these ranks.

    With a single replica of the attention layers, it leaves the replicas of experts whole and then
    counts their gradients several times in the norm.
    """
    return groups.dp_cp.size() > 1


def complete(optimizer: MegatronOptimizer, settings: OptimizerConfig, model: Model) -> None:
    """Finish what Megatron-Core made of the parameters that `mark_fused` has marked."""
    if isinstance(optimizer, LayerWiseDistributedOptimizer):
        optimizer.config = settings
        optimizer.chained_optimizers = [
            part if isinstance(part, MegatronOptimizer) else FP32Optimizer(part, settings, _made)
            for part in optimizer.chained_optimizers
        ]
    for module in model.modules:
        for parameter in module.parameters():
            if (master := getattr(parameter, "main_param", None)) is not None:
                for mark in _MARKS:
                    if hasattr(parameter, mark):
                        setattr(master, mark, getattr(parameter, mark))


def _made(*_: Any) -> None:
    """Make no state: `checkpoint.moments` does when a checkpoint is written or read."""
