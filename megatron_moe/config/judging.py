"""A run's configuration for commands that do not train: evaluation, analysis, measuring."""

from __future__ import annotations

from megatron_moe.config.data import Domain, Mixing
from megatron_moe.config.moe import Moe, Upcycle
from megatron_moe.config.run import RunConfig


def judging(config: RunConfig, world_size: int) -> RunConfig:
    """Remove what only training needs: training text, reference losses, the global batch size.

    Overlap of tensor-parallel communication is turned off, because its buffers have the shape of
    training's micro-batches.
    """
    data = config.data
    mixing = Mixing(weights=data.mixing.weights)
    domains = {name: _held_out_alone(domain) for name, domain in (data.domains or {}).items()}
    update = {"mixing": mixing, "domains": domains or None}
    if data.validation_path is not None:
        update["path"] = data.validation_path
    batch = config.train.micro_batch_size * world_size
    train = {"global_batch_size": batch, "tp_comm_overlap": False}
    return config.model_copy(
        update={
            "data": data.model_copy(update=update),
            "train": config.train.model_copy(update=train),
        }
    )


def _held_out_alone(domain: Domain) -> Domain:
    """Return the domain with its held-out text in place of its training text."""
    return domain.model_copy(update={"path": domain.validation_path or domain.path})


def dense_config(config: RunConfig) -> RunConfig:
    """Return the configuration of the dense model: no MoE layers, one sequence per micro-batch."""
    moe = Moe(num_moe_experts=config.moe.num_moe_experts, moe_layers=[])
    other = {"micro_batch_size": 1, "recompute": "none", "tp_comm_overlap": False}
    train = config.train.model_copy(update=other)
    return config.model_copy(update={"moe": moe, "upcycle": Upcycle(), "train": train})
