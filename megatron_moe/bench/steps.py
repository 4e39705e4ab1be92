"""Training steps as training takes them, timed and profiled on one rank.

A step is what `train.train_step` does, batches included, but without validation, checkpoints and
logs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_moe.bench.build import Supply, make_supply, make_timed_state
from megatron_moe.bench.phases import Stopwatch, watched
from megatron_moe.bench.record import PHASES
from megatron_moe.config.run import RunConfig
from megatron_moe.model.config import check_dispatcher
from megatron_moe.parallel.groups import create_groups
from megatron_moe.planner.flops import SequenceFlops, sequence_flops
from megatron_moe.planner.shape import run_shape
from megatron_moe.runtime.engine import engine_of
from megatron_moe.runtime.wait import waiter
from megatron_moe.runtime.world import World
from megatron_moe.train.guard import StepGuard
from megatron_moe.train.metrics import Numbers, step_numbers
from megatron_moe.train.peak import Peak, device_peak
from megatron_moe.train.state import TrainState
from megatron_moe.train.step import StepResult, train_step


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """Options of a measurement besides the configuration."""

    steps: int = 20
    warmup: int = 5
    routing: Literal["natural", "balanced"] = "natural"
    random: bool = False
    """Use random weights and tokens: read only config.json of the dense model, and no text."""


class Bench:
    """One rank's part of the measurement."""

    def __init__(self, config: RunConfig, world: World, options: BenchOptions) -> None:
        check_dispatcher(config.moe, engine_of(config.run.engine, world))
        self.config, self.world, self.options = config, world, options
        layout, self._groups = create_groups(config.parallel, seed=config.run.seed)
        self.state: TrainState = make_timed_state(
            config, world, layout, self._groups,
            random=options.random, balanced=options.routing == "balanced",
        )  # fmt: skip
        spec = self.state.model.spec
        self._supply: Supply = make_supply(config, spec, self._groups, random=options.random)
        self.shape = run_shape(config, spec)
        self.flops: SequenceFlops = sequence_flops(
            self.shape, config.data.seq_length, config.frozen_after(0)
        )
        self.peak: Peak = device_peak(world.device, self.state.model.transformer.params_dtype)
        self._guard = StepGuard(config.guard)
        self._stopwatch = Stopwatch(waiter(world.device))

    @property
    def groups(self) -> ProcessGroupCollection:
        """This rank's process groups."""
        return self._groups

    def timed_step(self) -> Numbers:
        """Take a step and return the numbers that training would log."""
        wait = waiter(self.world.device)
        wait()
        start = time.perf_counter()
        batches = self._supply(self.state)
        data_seconds = time.perf_counter() - start
        result = self._step(batches)
        wait()
        return step_numbers(
            result,
            step=self.state.step,
            tokens=self.state.tokens,
            learning_rate=self.state.learning_rate,
            seconds=time.perf_counter() - start,
            data_seconds=data_seconds,
            flops=self.flops,
            peak_flops=self.peak.flops_per_second,
            config=self.config,
        )

    def profiled_step(self) -> dict[str, float]:
        """Take a step and return its seconds by phase, the mean over ranks."""
        with watched(self.state, self._stopwatch):
            self._stopwatch.start()
            with self._stopwatch.range("data"):
                batches = self._supply(self.state)
            self._step(batches)
            seconds = self._stopwatch.read()
        mine = torch.tensor([seconds[phase] for phase in PHASES], dtype=torch.float64)
        mine = mine.to(self.world.device)
        dist.all_reduce(mine)
        return dict(zip(PHASES, (mine / self.world.size).tolist(), strict=True))

    def step(self) -> StepResult:
        """Train on the next batches, without waiting for the device."""
        return self._step(self._supply(self.state))

    def _step(self, batches: list[Any]) -> StepResult:
        return train_step(
            self.state, batches, self.config, self._groups, guard=self._guard, at=lambda _: None
        )
