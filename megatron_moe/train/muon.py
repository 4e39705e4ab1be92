"""Complete Megatron-Core's Muon: fused gate and up, and sharded state in fp32 runs.

Muon replaces the momentum of a matrix by the nearest orthogonal matrix, by Newton-Schulz steps.
Megatron-Core 0.19 does so for each expert and for query, key and value separately, but
* orthogonalizes gate and up, which one parameter holds, as one matrix;
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


def complete(optimizer: MegatronOptimizer, settings: OptimizerConfig) -> None:
    """Wrap the parts of a layer-wise optimizer, which Megatron-Core does only with bf16."""
    if isinstance(optimizer, LayerWiseDistributedOptimizer):
        optimizer.config = settings
        optimizer.chained_optimizers = [
            part if isinstance(part, MegatronOptimizer) else FP32Optimizer(part, settings, _made)
            for part in optimizer.chained_optimizers
        ]


def _made(*_: Any) -> None:
    """Make no state: `checkpoint.moments` does when a checkpoint is written or read."""
