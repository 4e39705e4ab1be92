"""A run's configuration for commands that do not train: evaluation, analysis, measuring."""

from __future__ import annotations

from megatron_moe.config.data import Domain, Mixing
from megatron_moe.config.moe import Moe, Upcycle
from megatron_moe.config.run import RunConfig
from megatron_moe.config.train import Lora

_NO_OVERLAP = {
    "tp_comm_overlap": False,
    "overlap_moe_expert_parallel_comm": False,
    "delay_wgrad_compute": False,
}


def judging(config: RunConfig, world_size: int) -> RunConfig:
    """Remove what only training needs: training text, reference losses, the global batch size.

    Overlap of communication is turned off: with tp, its buffers have the shape of training's
    micro-batches; with ep, it is for backward passes, and does not suit every layout.
    """
    data = config.data
    mixing = Mixing(weights=data.mixing.weights)
    domains = {name: _held_out_alone(domain) for name, domain in (data.domains or {}).items()}
    update = {"mixing": mixing, "domains": domains or None}
    if data.validation_path is not None:
        update["path"] = data.validation_path
    batch = config.train.micro_batch_size * world_size
    train = {"global_batch_size": batch, **_NO_OVERLAP}
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
    """Return the configuration of the dense model: no MoE layers and adapters, single sequences."""
    moe = Moe(num_moe_experts=config.moe.num_moe_experts, moe_layers=[])
    other = {"micro_batch_size": 1, "recompute": "none", **_NO_OVERLAP}
    train = config.train.model_copy(update=other)
    update = {"moe": moe, "upcycle": Upcycle(), "train": train, "lora": Lora()}
    return config.model_copy(update=update)
