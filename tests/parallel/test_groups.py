"""Test the backends and timeouts of process groups."""

from datetime import timedelta
from typing import Any

import pytest
from ranks import run_on_ranks

from megatron_moe.config.run import Guard, Parallel
from megatron_moe.runtime.world import TIMEOUT, World

pytestmark = pytest.mark.distributed


def test_groups_time_out_after_the_watchdog_and_have_the_backend_of_the_world():
    run_on_ranks(check_groups, world_size=2)


def check_groups(world: World) -> None:
    import torch.distributed as dist

    from megatron_moe.parallel.groups import create_groups

    new_group, created = dist.new_group, []

    def recorded(*args: Any, **kwargs: Any) -> Any:
        created.append(kwargs)
        return new_group(*args, **kwargs)

    dist.new_group = recorded
    try:
        create_groups(Parallel(expert_parallel_size=2), seed=0)
    finally:
        dist.new_group = new_group
    assert len(created) > 10
    assert {group.get("backend") for group in created} == {None}, "not the backend of the world"
    assert {group["timeout"] for group in created} == {TIMEOUT}
    assert timedelta(seconds=Guard().hang_seconds) < TIMEOUT
