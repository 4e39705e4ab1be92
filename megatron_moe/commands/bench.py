"""The story of ``megatron-moe bench CONFIG``: steps as training takes them, timed and taken apart.

Warm-up, then timed steps without anything around them, then a few more with ranges (`phases.py`).
A step is what `train.train_step` does, batches included; validation, checkpoints and logs are not.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_moe.bench.build import Supply, make_supply, make_timed_state
from megatron_moe.bench.phases import Stopwatch, watched
from megatron_moe.bench.record import PHASES, Capacity, Mfu, Phases, StepsRecord, spread
from megatron_moe.bench.surroundings import surroundings
from megatron_moe.config.run import RunConfig
from megatron_moe.model.capacity import capacity_of
from megatron_moe.model.config import check_dispatcher
from megatron_moe.parallel.groups import create_groups
from megatron_moe.planner.flops import forward_flops, training_flops
from megatron_moe.planner.parameters import active_parameters, total_parameters
from megatron_moe.planner.shape import upcycled_shape
from megatron_moe.planner.workload import degrees_of
from megatron_moe.runtime.engine import engine_of
from megatron_moe.runtime.wait import waiter
from megatron_moe.runtime.world import World
from megatron_moe.train.guard import StepGuard
from megatron_moe.train.metrics import Numbers, step_numbers
from megatron_moe.train.peak import Peak, device_peak
from megatron_moe.train.state import TrainState
from megatron_moe.train.step import StepResult, train_step

PROFILED_STEPS = 3
FORMULA = (
    "flops_per_sequence * global_batch_size / step_seconds / ranks / denominator_flops_per_second; "
    "flops_per_sequence: matrix products of forward and backward (twice forward), two operations a "
    "multiply-add, full attention, output layer included, router, padding and recomputation not"
)
HOW = (
    "steps of their own, the device waited for where a phase begins and ends; time counts for the "
    "innermost phase; mean over ranks"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is to be measured, besides the configuration."""

    steps: int = 20
    warmup: int = 5
    routing: Literal["natural", "balanced"] = "natural"
    random: bool = False
    """Random weights and tokens: of the dense model only config.json is read, and no text."""


class Bench:
    """One rank's part of the measurement."""

    def __init__(self, config: RunConfig, world: World, wish: Wish) -> None:
        check_dispatcher(config.moe, engine_of(config.run.engine, world))
        self.config, self.world, self.wish = config, world, wish
        layout, self._groups = create_groups(config.parallel, seed=config.run.seed)
        self.state: TrainState = make_timed_state(
            config, world, layout, self._groups,
            random=wish.random, balanced=wish.routing == "balanced",
        )  # fmt: skip
        spec = self.state.model.spec
        self._supply: Supply = make_supply(config, spec, self._groups, random=wish.random)
        self.shape = upcycled_shape(spec, config.moe)
        forward = forward_flops(self.shape, sequence_length=config.data.seq_length).model
        self.flops_per_sequence = training_flops(forward)
        self.peak: Peak = device_peak(world.device, self.state.model.transformer.params_dtype)
        self._guard = StepGuard(config.guard)
        self._stopwatch = Stopwatch(waiter(world.device))

    @property
    def groups(self) -> ProcessGroupCollection:
        """This rank's process groups."""
        return self._groups

    def timed_step(self) -> Numbers:
        """The numbers that a training step of the run would log."""
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
            samples=self.state.samples,
            learning_rate=self.state.learning_rate,
            seconds=time.perf_counter() - start,
            data_seconds=data_seconds,
            flops_per_sequence=self.flops_per_sequence,
            peak_flops=self.peak.flops_per_second,
            config=self.config,
        )

    def profiled_step(self) -> dict[str, float]:
        """Seconds by phase, mean over ranks; together one step."""
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


def bench(config: RunConfig, world: World, wish: Wish) -> StepsRecord:
    """Measure a configuration; all ranks call it and get the same record.

    `rules.check` has passed the configuration.
    """
    it = Bench(config, world, wish)
    for _ in range(wish.warmup):
        it.timed_step()
    steps = [it.timed_step() for _ in range(wish.steps)]
    phases = [it.profiled_step() for _ in range(PROFILED_STEPS)]
    of = {name: [float(step[name]) for step in steps] for name in _NUMBERS}
    moe = config.moe
    return StepsRecord(
        name=config.run.dir.name,
        surroundings=surroundings(world.device),
        config=config.model_dump(mode="json"),
        dense=asdict(it.state.model.spec),
        layout=degrees_of(config, gpus=world.size).to_json(),
        total_parameters=total_parameters(it.shape),
        active_parameters=active_parameters(it.shape),
        routing=wish.routing,
        weights="random" if wish.random else "dense checkpoint",
        data="random tokens" if wish.random else "text",
        capacity=_capacity(config, tokens=_routed_tokens(config), experts=moe.num_moe_experts),
        warmup_steps=wish.warmup,
        timed_steps=wish.steps,
        each_step_seconds=of["time/step_seconds"],
        step_seconds=spread(of["time/step_seconds"]),
        tokens_per_second_per_gpu=spread(of["throughput/tokens_per_second_per_gpu"]),
        tflops_per_gpu=spread(of["throughput/tflops_per_gpu"]),
        mfu=spread(of["throughput/mfu"]),
        mfu_is=Mfu(
            formula=FORMULA,
            flops_per_sequence=it.flops_per_sequence,
            denominator_flops_per_second=it.peak.flops_per_second,
            denominator_source=it.peak.source,
        ),
        phases=_phases(phases),
        load_imbalance=spread(of["router/load_imbalance"]),
        drop_rate=spread(of["router/drop_rate"]),
        peak_memory_gib=max(of["memory/peak_gib"]),
        last_loss=of["loss/lm"][-1],
    )


_NUMBERS = (
    "time/step_seconds", "throughput/tokens_per_second_per_gpu", "throughput/tflops_per_gpu",
    "throughput/mfu", "router/load_imbalance", "router/drop_rate", "memory/peak_gib", "loss/lm",
)  # fmt: skip


def _phases(steps: list[dict[str, float]]) -> Phases:
    return Phases(
        how=HOW,
        steps=len(steps),
        step_seconds=spread([sum(step.values()) for step in steps]),
        seconds={phase: spread([step[phase] for step in steps]) for phase in PHASES},
    )


def _routed_tokens(config: RunConfig) -> int:
    """Tokens of a micro-batch on one rank: what its router sees."""
    parallel = config.parallel
    tokens = config.train.micro_batch_size * config.data.seq_length
    return tokens // (parallel.context_parallel_size * parallel.tensor_parallel_size)


def _capacity(config: RunConfig, *, tokens: int, experts: int) -> Capacity | None:
    limit, factor = capacity_of(config.moe), config.moe.moe_expert_capacity_factor
    if limit is None or factor is None:
        return None
    return Capacity(
        factor=factor,
        formula=config.moe.capacity_formula,
        padded=limit.pad,
        tokens_per_expert=limit.tokens(
            tokens, num_experts=experts, topk=config.moe.moe_router_topk
        ),
    )
