"""From a recipe to a plan that is ready to build with: tables read, or solved on the ranks.

Clusters of weights are found at the start of a run: the ranks share the layers, each reads the rows
it clusters, and all learn the result. The plan is kept in run.dir, so a resume clusters nothing.
"""

from __future__ import annotations

import numpy as np
import torch.distributed as dist

from megatron_moe.config.run import RunConfig
from megatron_moe.errors import ConfigError
from megatron_moe.experts import split
from megatron_moe.experts.file import PLAN_FILE, read_plan, write_plan
from megatron_moe.experts.plan import ExpertPlan, LayerTable
from megatron_moe.hf.reader import DenseCheckpoint


def complete_plan(plan: ExpertPlan, config: RunConfig, dense: DenseCheckpoint) -> ExpertPlan:
    """``plan`` with every table it needs; every rank calls it and gets the same.

    Raises:
        CheckpointError: The plan file is missing, or of other settings or another model.
    """
    kept = config.run.dir / PLAN_FILE
    if plan.recipe.needs_measuring:
        if config.upcycle.plan is None:  # the rules have refused it
            raise ConfigError("upcycle.plan is needed")
        found = read_plan(config.upcycle.plan, plan, source=dense.fingerprint())
    elif not plan.recipe.needs_weights:
        return plan
    elif kept.exists():
        return read_plan(kept, plan, source=dense.fingerprint())
    else:
        found = plan.with_tables(clustered_tables(plan, dense))
    dist.barrier()  # every rank has seen whether there was one
    if dist.get_rank() == 0:
        write_plan(kept, found, source=dense.fingerprint())
    return found


def clustered_tables(plan: ExpertPlan, dense: DenseCheckpoint) -> dict[int, LayerTable]:
    """Clusters of each MoE layer's neurons, the layers shared out over the ranks."""
    recipe, world = plan.recipe, dist.get_world_size()
    mine = {}
    for layer in recipe.moe_layers[dist.get_rank() :: world]:
        up = dense.read(f"model.layers.{layer}.mlp.up_proj.weight").float().numpy()
        part = split.clustered(recipe, layer, np.ascontiguousarray(up))
        mine[layer] = LayerTable(neurons_EM=part.neurons_EM, shared_S=part.shared_S)
    return gather_tables(mine)


def gather_tables(mine: dict[int, LayerTable]) -> dict[int, LayerTable]:
    """The tables of all ranks, on every rank, by ascending layer."""
    gathered: list[dict[int, LayerTable]] = [{}] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    together = {layer: table for tables in gathered for layer, table in tables.items()}
    return dict(sorted(together.items()))
