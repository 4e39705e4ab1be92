"""A run's configuration for what does not train: evaluation, analysis."""

from __future__ import annotations

from megatron_moe.config.run import Domain, Mixing, Moe, RunConfig, Upcycle


def judging(config: RunConfig, world_size: int) -> RunConfig:
    """A run's configuration without what only training needs: text, references, a global batch.

    Tensor-parallel overlap goes too: its buffers are for training's micro-batches alone.
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
    """The domain with its held-out text in the place of what it trains on, which is not read."""
    return domain.model_copy(update={"path": domain.validation_path or domain.path})


def dense_config(config: RunConfig) -> RunConfig:
    """The run's configuration with no layer routed and a sequence at a time."""
    moe = Moe(num_moe_experts=config.moe.num_moe_experts, moe_layers=[])
    other = {"micro_batch_size": 1, "recompute": "none", "tp_comm_overlap": False}
    train = config.train.model_copy(update=other)
    return config.model_copy(update={"moe": moe, "upcycle": Upcycle(), "train": train})
