"""Save and restore a training state, every rank its part, with Megatron-Core's dist_checkpointing.

Weights are saved under global keys (layer and expert numbers of the whole model): any layout, and
the export, can read them. Optimizer state is saved as each rank holds it, without gathering: that
takes no memory and no communication, and is read back under the same layout. Nothing random is
saved because nothing in training draws a number: the order of the data is a function of its seed,
and the schedule of the step.
"""

from __future__ import annotations

import logging
import queue
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_moe.checkpoint import folder as folders
from megatron_moe.checkpoint.folder import Progress
from megatron_moe.config.load import dump
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import CheckpointError
from megatron_moe.train.state import TrainState

# A save here is written by this process: its results need no queue between processes, for which
# Megatron-Core would start an interpreter on every rank (6 to 13 s on a laptop).
filesystem_async.get_write_results_queue = queue.Queue
logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.ERROR)


def save(
    state: TrainState, config: RunConfig, groups: ProcessGroupCollection, *, plan_hash: str
) -> Path:
    """Write a checkpoint of the current step; it is complete under its name or not there.

    Returns:
        The checkpoint's folder, on every rank after it is complete.
    """
    final = folders.step_folder(config.run.dir, state.step)
    if dist.get_rank() == 0:
        folders.start_folder(final)
    dist.barrier()
    partial = final.with_name(f".{final.name}.partial")
    dist_checkpointing.save(
        _sharded(state, groups, step=state.step, is_loading=False), str(partial)
    )
    dist.barrier()
    if dist.get_rank() == 0:
        progress = Progress(
            step=state.step,
            samples=state.samples,
            plan_hash=plan_hash,
            world_size=dist.get_world_size(),
            precision=config.train.precision,
        )
        folders.describe(partial, progress, dump(config), config.dense.path)
        folders.publish(partial, final)
        folders.prune(config.run.dir, config.checkpoint.keep)
    dist.barrier()
    return final


@torch.no_grad()
def restore(
    state: TrainState,
    folder: Path,
    config: RunConfig,
    groups: ProcessGroupCollection,
    *,
    plan_hash: str,
) -> None:
    """Set weights, optimizer, schedule and the place in the data to what ``folder`` holds.

    Raises:
        CheckpointError: The checkpoint is of another model, precision or layout, or damaged.
    """
    progress = folders.read_progress(folder)
    saved_config = folders.read_config(folder)
    checks = [
        ("expert plan (moe.* and upcycle.*)", progress.plan_hash, plan_hash),
        ("train.precision", progress.precision, config.train.precision),
    ]
    if progress.step:  # an upcycled checkpoint without steps has weights only: any layout
        checks += [
            ("world_size", progress.world_size, dist.get_world_size()),
            ("parallel", saved_config.parallel, config.parallel),
        ]
    for name, saved, now in checks:
        if saved != now:
            raise CheckpointError(
                f"{folder} was written with {name} ({saved}), but this job has ({now}).\n"
                "  restore the setting, or choose another run.dir"
            )
    try:
        loaded: Any = dist_checkpointing.load(
            _sharded(state, groups, step=progress.step, is_loading=True), str(folder)
        )
    except (CheckpointingException, OSError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"cannot load {folder}: {error}") from error
    for index, module in enumerate(state.model.modules):
        module.load_state_dict(loaded[f"model{index}"])
    if progress.step == 0:
        state.optimizer.reload_model_params()
    else:
        state.optimizer.load_state_dict(loaded["optimizer"])
    state.schedule.step(increment=progress.step - state.step)
    state.step, state.samples = progress.step, progress.samples


def _sharded(
    state: TrainState, groups: ProcessGroupCollection, *, step: int, is_loading: bool
) -> dict[str, Any]:
    metadata = {
        # By buffer, not by parameter (fully_reshardable): the latter gathers the state of all dp
        # ranks on each of them (22 GiB for the demo), and Megatron-Core 0.19 then shifts it when
        # a buffer has several buckets, as tied embeddings on two stages have.
        "distrib_optim_sharding_type": "dp_reshardable",
        "dp_cp_group": groups.dp_cp,
    }
    model = {
        f"model{index}": module.sharded_state_dict(metadata=metadata)
        for index, module in enumerate(state.model.modules)
    }
    if step == 0:  # moments are not there yet, and master weights are the weights
        return model
    optimizer = state.optimizer.sharded_state_dict(model, is_loading, metadata=metadata)
    return {**model, "optimizer": optimizer}
