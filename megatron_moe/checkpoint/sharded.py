"""Save and restore a training state, every rank its part, with Megatron-Core's dist_checkpointing.

Keys are global (layer and expert numbers of the whole model), so what one layout saved another
can load. Nothing random is saved because nothing in training draws a number: the order of the data
is a function of its seed, and the schedule of the step.
"""

from __future__ import annotations

import functools
import logging
import queue
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

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


def _keep_bucket_padding(collect: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron-Core's gathered optimizer state, with every bucket at its own offset.

    Megatron-Core 0.19 joins the buckets of a buffer without the padding between them, and then
    looks parameters up at offsets that count it: from the second bucket on (tied embeddings have
    one of their own) the state saved for a parameter is another's, shifted.
    """

    @functools.wraps(collect)
    def collected(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = collect(self, *args, **kwargs)
        if state is None:
            return None
        for index, buffer in enumerate(self.buffers):
            for tensors in state[index].values():
                for key, joined in tensors.items():
                    if isinstance(joined, Tensor):
                        tensors[key] = _spread(joined, buffer)
        return state

    return collected


def _spread(joined: Tensor, buffer: Any) -> Tensor:
    spread, start = joined.new_zeros(buffer.numel), 0
    for bucket in buffer.buckets:
        part = joined[start : start + bucket.numel_unpadded]
        spread[bucket.offset : bucket.offset + len(part)] = part
        start += len(part)
    return spread


DistributedOptimizer.get_parameter_state_dp_zero = _keep_bucket_padding(
    DistributedOptimizer.get_parameter_state_dp_zero
)


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


def restore(
    state: TrainState,
    folder: Path,
    groups: ProcessGroupCollection,
    *,
    plan_hash: str,
    precision: str,
) -> None:
    """Set weights, optimizer, schedule and the place in the data to what ``folder`` holds.

    Raises:
        CheckpointError: The checkpoint is of another model or precision, or damaged.
    """
    progress = folders.read_progress(folder)
    for name, saved, now in (
        ("expert plan (moe.* and upcycle.*)", progress.plan_hash, plan_hash),
        ("train.precision", progress.precision, precision),
    ):
        if saved != now:
            raise CheckpointError(
                f"{folder} was written with {name} {saved}, but the configuration says {now}.\n"
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
        # Optimizer state by parameter instead of by buffer: any layout can load it.
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
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
