"""Restore a run's model from a checkpoint for inference: no optimizer, no gradients."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module

from megatron_moe.checkpoint.folder import Progress, plan_of
from megatron_moe.checkpoint.sharded import restore_weights
from megatron_moe.config.run import RunConfig
from megatron_moe.experts.plan import ExpertPlan
from megatron_moe.hf.spec import read_spec
from megatron_moe.model.build import Model, build_model
from megatron_moe.model.config import check_dispatcher
from megatron_moe.model.routers import set_output_scales
from megatron_moe.parallel.groups import create_groups
from megatron_moe.parallel.layout import ParallelLayout
from megatron_moe.runtime.engine import engine_of
from megatron_moe.runtime.world import World


@dataclass(frozen=True, slots=True)
class Restored:
    """One rank's shard of a trained model."""

    model: Model
    modules: list[Any]
    """The model's chunks wrapped for mixed precision, as the pipeline schedules run them."""
    plan: ExpertPlan
    layout: ParallelLayout
    groups: ProcessGroupCollection
    progress: Progress
    """Contents of checkpoint.json."""


def restored_model(config: RunConfig, world: World, checkpoint: Path) -> Restored:
    """Build this rank's shard under the configured layout; fill it from a checkpoint of any layout.

    Args:
        config: The run's configuration, as `judging` returns it.
        world: This rank's position in the job.
        checkpoint: A checkpoint folder.

    Raises:
        CheckpointError: The checkpoint has another model or precision, or is damaged.
    """
    engine = engine_of(config.run.engine, world)
    check_dispatcher(config.moe, engine)
    layout, groups = create_groups(config.parallel, seed=config.run.seed)
    spec = read_spec(config.source.path)
    plan = plan_of(checkpoint, spec, config)
    model = build_model(config, spec, layout=layout, groups=groups, rank=world.rank, engine=engine)
    set_output_scales(model.modules, plan)
    bf16 = model.transformer.bf16
    modules = [Float16Module(model.transformer, m) if bf16 else m for m in model.modules]
    progress = restore_weights(model, checkpoint, config, groups, plan_hash=plan.hash)
    return Restored(model, modules, plan, layout, groups, progress)
