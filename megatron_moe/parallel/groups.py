"""Create Megatron-Core's process groups and check them against the layout's arithmetic."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_moe.config.run import Parallel
from megatron_moe.parallel.layout import ParallelLayout, fold
from megatron_moe.runtime.world import TIMEOUT


def create_groups(
    parallel: Parallel, *, seed: int
) -> tuple[ParallelLayout, ProcessGroupCollection]:
    """Compute the layout of the initialized world and create Megatron-Core's groups for it.

    Returns:
        The layout and the groups; each of this rank's groups has the ranks given by the layout.

    Raises:
        AssertionError: Megatron-Core's groups differ from the layout, which is a bug.
    """
    vpp = parallel.virtual_pipeline_parallel_size or 1
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_parallel_size,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        order="tp-cp-ep-dp-pp",
        # Groups have the world's timeout, so that the watchdog reports first: Megatron-Core's
        # default of 30 minutes equals guard.hang_seconds. Its gloo groups are only for its own
        # checkpoints.
        distributed_timeout_minutes=int(TIMEOUT.total_seconds()) // 60,
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(seed)
    layout = fold(parallel, world_size=dist.get_world_size())
    groups = ProcessGroupCollection.use_mpu_process_groups()
    for expected, group in (
        (layout.attention.groups("tp"), groups.tp),
        (layout.attention.groups("cp"), groups.cp),
        (layout.attention.groups("dp", "cp"), groups.dp_cp),
        (layout.attention.groups("pp"), groups.pp),
        (layout.experts.groups("etp"), groups.expt_tp),
        (layout.experts.groups("ep"), groups.ep),
        (layout.experts.groups("edp"), groups.expt_dp),
    ):
        assert dist.get_process_group_ranks(group) in expected, (expected, group)
    return layout, groups


def destroy_groups() -> None:
    """Destroy the groups, so that another layout can be created in the same processes."""
    parallel_state.destroy_model_parallel()
