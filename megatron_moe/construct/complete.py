"""Complete a plan with its tables: read them from a file, or compute them on the ranks.

Clusters of weights are computed at the start of a run. Each rank clusters some of the layers and
reads only their rows, and the results are gathered on all ranks. The plan is stored in run.dir, so
that a resumed run does not cluster again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_moe.config.run import RunConfig
from megatron_moe.errors import ConfigError
from megatron_moe.experts.file import PLAN_FILE, read_plan, write_plan
from megatron_moe.experts.merge import merged
from megatron_moe.experts.methods import ffns_of_layer, partition
from megatron_moe.experts.partition import Evidence
from megatron_moe.experts.plan import ExpertPlan, LayerTable
from megatron_moe.experts.solved import check_solved, solved_folder
from megatron_moe.hf.names import MOE_TENSORS, expert_names, ffn_names
from megatron_moe.hf.reader import SourceCheckpoint


def complete_plan(plan: ExpertPlan, config: RunConfig, dense: SourceCheckpoint) -> ExpertPlan:
    """Return ``plan`` with every table it needs. All ranks must call this and get the same plan.

    Raises:
        CheckpointError: The plan file is missing, or was made for other settings or another model.
    """
    path = config.run.dir / PLAN_FILE
    if plan.needs == "text":
        if config.upcycle.plan is None:  # `construction_violations` reports this earlier
            raise ConfigError("upcycle.plan must be set")
        complete = plan_on_text(config.upcycle.plan, plan, dense)
    elif plan.needs == "nothing":
        return plan
    elif path.exists():
        return read_plan(path, plan, source=dense.fingerprint())
    else:
        complete = plan.with_tables(tables_from_weights(plan, dense))
    dist.barrier()  # every rank has checked whether the file exists
    if dist.get_rank() == 0:
        write_plan(path, complete, source=dense.fingerprint())
    return complete


def plan_on_text(path: Path, plan: ExpertPlan, dense: SourceCheckpoint) -> ExpertPlan:
    """Read a plan that ``construct`` wrote, with its solved matrices; all ranks must call this.

    Raises:
        CheckpointError: The file, or one of its matrices, is missing, or is of another plan.
    """
    complete = read_plan(path, plan, source=dense.fingerprint())
    layers = complete.solved_layers[dist.get_rank() :: dist.get_world_size()]
    check_solved_layers(complete, path, layers)
    return complete


def check_solved_layers(plan: ExpertPlan, path: Path, layers: Sequence[int]) -> None:
    """Compare the files of these layers' solved matrices with their hashes in the plan.

    Raises:
        CheckpointError: A file is missing or changed.
    """
    for layer in layers:
        check_solved(solved_folder(path), layer, plan.tables[layer].down_hash or "")


def tables_from_weights(plan: ExpertPlan, dense: SourceCheckpoint) -> dict[int, LayerTable]:
    """Apply a method that needs weights to each MoE layer; layers are divided among the ranks."""
    recipe, world = plan.recipe, dist.get_world_size()
    tables = {}
    for layer in recipe.moe_layers[dist.get_rank() :: world]:
        names = [
            expert_names(layer, expert)[1] if recipe.source_experts else ffn_names(layer)[1]
            for expert in range(ffns_of_layer(recipe))
        ]
        evidence = [Evidence(up_FD=weights(dense, name)) for name in names]
        part = partition(recipe, layer, evidence)
        tables[layer] = LayerTable(
            neurons_EM=part.neurons_EM, shared_S=part.shared_S, expert_E=part.expert_E
        )
    return gather_tables(tables)


def merged_tables(
    plan: ExpertPlan, load_LO: NDArray[np.float64], dense: SourceCheckpoint
) -> dict[int, LayerTable]:
    """Merge similar experts of each MoE layer; layers are divided among the ranks."""
    recipe, tables = plan.recipe, {}
    for layer in recipe.moe_layers[dist.get_rank() :: dist.get_world_size()]:
        router_OD = weights(dense, MOE_TENSORS["router"][0].format(layer=layer))
        merge = merged(
            router_OD, load_LO[layer], recipe.num_experts, partial(_matrices, dense, layer)
        )
        busiest_E = np.array([max(merge.members(e), key=merge.weight_O.__getitem__)
                              for e in range(recipe.num_experts)])  # fmt: skip
        tables[layer] = LayerTable(
            expert_E=busiest_E, into_O=merge.into_O, weight_O=merge.weight_O,
            order_OM=merge.order_OM,
        )  # fmt: skip
    return gather_tables(tables)


def _matrices(dense: SourceCheckpoint, layer: int, expert: int) -> list[NDArray[np.float32]]:
    """Read gate, up and down of an expert of a MoE source, one row per neuron."""
    gate, up, down = (weights(dense, name) for name in expert_names(layer, expert))
    return [gate, up, down.T]


def weights(dense: SourceCheckpoint, name: str) -> NDArray[np.float32]:
    """Read a matrix of the source in fp32."""
    return np.ascontiguousarray(dense.read(name).float().numpy())


def gather_tables(local: dict[int, LayerTable]) -> dict[int, LayerTable]:
    """Gather the tables of all ranks on every rank, by ascending layer."""
    gathered: list[dict[int, LayerTable]] = [{}] * dist.get_world_size()
    dist.all_gather_object(gathered, local)
    merged = {layer: table for tables in gathered for layer, table in tables.items()}
    return dict(sorted(merged.items()))
