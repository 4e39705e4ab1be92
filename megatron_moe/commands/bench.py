"""The story of ``megatron-moe bench CONFIG``: time training steps, and where their time goes.

Warm-up steps, then timed steps with nothing around them, then a few profiled ones (`phases.py`).
"""

from __future__ import annotations

from dataclasses import asdict

from megatron_moe.bench.record import PHASES, Capacity, Mfu, Phases, StepsRecord, spread
from megatron_moe.bench.steps import Bench, BenchOptions
from megatron_moe.bench.surroundings import surroundings
from megatron_moe.config.run import RunConfig
from megatron_moe.model.capacity import capacity_of
from megatron_moe.planner.parameters import active_parameters, total_parameters
from megatron_moe.planner.workload import degrees_of
from megatron_moe.runtime.world import World

PROFILED_STEPS = 3
FORMULA = (
    "flops_per_sequence * global_batch_size / step_seconds / ranks / denominator_flops_per_second; "
    "flops_per_sequence: matrix products of forward and backward (twice forward), two operations a "
    "multiply-add, the attention that a causal model needs, output layer included, router, padding "
    "and recomputation not; mfu_full_attention counts the whole square of the attention scores"
)
HOW = (
    "steps of their own, the device waited for where a phase begins and ends; time counts for the "
    "innermost phase; mean over ranks"
)


def bench(config: RunConfig, world: World, options: BenchOptions) -> StepsRecord:
    """Measure a configuration; all ranks call it and get the same record.

    `rules.check` has passed the configuration.
    """
    it = Bench(config, world, options)
    for _ in range(options.warmup):
        it.timed_step()
    steps = [it.timed_step() for _ in range(options.steps)]
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
        routing=options.routing,
        weights="random" if options.random else "dense checkpoint",
        data="random tokens" if options.random else "text",
        capacity=_capacity(config, tokens=_routed_tokens(config), experts=moe.num_moe_experts),
        warmup_steps=options.warmup,
        timed_steps=options.steps,
        each_step_seconds=of["time/step_seconds"],
        step_seconds=spread(of["time/step_seconds"]),
        tokens_per_second_per_gpu=spread(of["throughput/tokens_per_second_per_gpu"]),
        tflops_per_gpu=spread(of["throughput/tflops_per_gpu"]),
        mfu=spread(of["throughput/mfu"]),
        mfu_full_attention=spread(of["throughput/mfu_full_attention"]),
        mfu_is=Mfu(
            formula=FORMULA,
            flops_per_sequence=it.flops.causal,
            flops_per_sequence_full_attention=it.flops.full_attention,
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
    "throughput/mfu", "throughput/mfu_full_attention", "router/load_imbalance",
    "router/drop_rate", "memory/peak_gib", "loss/lm",
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
