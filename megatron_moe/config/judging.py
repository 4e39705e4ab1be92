"""A run's configuration for what does not train: evaluation, analysis."""

from __future__ import annotations

from megatron_moe.config.run import Domain, Mixing, RunConfig


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
