"""Which process groups are made, and how long they wait."""

from datetime import timedelta
from typing import Any

import pytest
from ranks import run_on_ranks

from megatron_moe.config.run import Guard, Parallel
from megatron_moe.runtime.world import TIMEOUT, World

pytestmark = pytest.mark.distributed


def test_groups_wait_longer_than_the_watch_and_none_is_of_gloo_for_its_own_sake():
    run_on_ranks(check_groups, world_size=2)


def check_groups(world: World) -> None:
    import torch.distributed as dist

    from megatron_moe.parallel.groups import create_groups

    new_group, made = dist.new_group, []

    def noted(*args: Any, **kwargs: Any) -> Any:
        made.append(kwargs)
        return new_group(*args, **kwargs)

    dist.new_group = noted
    try:
        create_groups(Parallel(expert_parallel_size=2), seed=0)
    finally:
        dist.new_group = new_group
    assert len(made) > 10
    assert {group.get("backend") for group in made} == {None}, "the backend of the world"
    assert {group["timeout"] for group in made} == {TIMEOUT}
    assert timedelta(seconds=Guard().hang_seconds) < TIMEOUT
