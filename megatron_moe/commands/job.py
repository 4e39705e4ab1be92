"""The context that all stages of a job share."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_moe.config.run import RunConfig
from megatron_moe.log import console
from megatron_moe.parallel.layout import ParallelLayout
from megatron_moe.runtime.engine import Engine
from megatron_moe.runtime.world import World
from megatron_moe.train.guard import Signals
from megatron_moe.train.watch import Watch


@dataclass(frozen=True, slots=True)
class Job:
    """Configuration, ranks and services that stages share once process groups exist."""

    config: RunConfig
    world: World
    engine: Engine
    layout: ParallelLayout
    groups: ProcessGroupCollection
    watch: Watch
    signals: Signals

    def say(self, text: str) -> None:
        """Print a line on rank 0, unless it is empty."""
        if text and self.world.rank == 0:
            console.print(text)
