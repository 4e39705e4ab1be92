"""Find changes that make a run fit into memory, from the cheapest to the most expensive.

A change of settings costs speed, or digits of gradients and optimizer state, and another layout
not even that. A frozen part is not trained. More or larger GPUs cost
money, and a shorter sequence or fewer experts make another model. Each change is tried, so its
numbers are predictions for the run after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

from megatron_moe.config.load import overridden
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import ConfigError
from megatron_moe.hf.spec import ModelSpec
from megatron_moe.planner.calibration import FITTED, Calibration
from megatron_moe.planner.candidates import divisors
from megatron_moe.planner.hardware import GPUS, gpu_named
from megatron_moe.planner.layer import Machine
from megatron_moe.planner.memory import GIB, estimated_state, peak_memory
from megatron_moe.planner.search import (
    Candidate,
    NothingFitsError,
    SearchResult,
    configured,
    search,
)
from megatron_moe.planner.shape import MoeShape, run_shape
from megatron_moe.planner.time import step_time
from megatron_moe.planner.workload import Degrees, Workload, workload_of
from megatron_moe.rules.check import violations

BF16_GRADIENTS = ("train.grad_reduce_in_fp32=false",)
BF16_MOMENTS = ("optimizer.exp_avg_dtype=bf16", "optimizer.exp_avg_sq_dtype=bf16")
ON_HOST = ("optimizer.optimizer_cpu_offload=true",)
LOW_RANK = ("lora.rank=16",)
LOW_RANK_EXPERTS = ("lora.rank=16", "lora.targets=[attention,experts]", "run.engine=torch")
WITHOUT_EXPERTS = ("train.freeze=[experts]",)

LESS_STATE = (
    BF16_MOMENTS,
    (*BF16_MOMENTS, *BF16_GRADIENTS),
    (*BF16_MOMENTS, *ON_HOST),
    (*BF16_MOMENTS, *BF16_GRADIENTS, *ON_HOST),
)
"""Settings that make gradients and optimizer state smaller, from the cheapest on."""
LESS_TRAINED = (
    LOW_RANK,
    LOW_RANK_EXPERTS,
    WITHOUT_EXPERTS,
    (*WITHOUT_EXPERTS, *LOW_RANK),
    (*WITHOUT_EXPERTS, *BF16_MOMENTS, *BF16_GRADIENTS),
    (*WITHOUT_EXPERTS, *BF16_MOMENTS, *BF16_GRADIENTS, *ON_HOST),
)
"""Settings that train less: not the largest part of the model, or updates of a small rank."""

MAX_DOUBLINGS = 7
"""Number of times that the GPUs are doubled in search of a number that fits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Relief:
    """A change after which the run fits."""

    change: str
    mfu: float
    tokens_per_second: float
    """Rate of all GPUs together."""
    gib: float
    usable_gib: float
    host_gib: float = 0.0
    """Host memory that each rank needs for optimizer state."""

    def __str__(self) -> str:
        host = f" and {self.host_gib:.1f} GiB of host memory" if self.host_gib else ""
        return (
            f"{self.change}: {self.gib:.1f} of {self.usable_gib:.1f} GiB{host}, "
            f"{self.mfu:.1f}% MFU, {self.tokens_per_second:,.0f} tokens/s in all"
        )


def searched(
    config: RunConfig, spec: ModelSpec, *, gpus: int, gpu: str, constants: Calibration = FITTED
) -> SearchResult:
    """Search as `search` does, and add to its message what to change if nothing fits.

    Raises:
        ConfigError: See `search`.
    """
    try:
        return search(config, spec, gpus=gpus, gpu=gpu, constants=constants)
    except NothingFitsError as error:
        changes = reliefs(config, spec, gpus=gpus, gpu=gpu) or ["none was found"]
        lines = [str(error), "  changes that make it fit, cheapest first:"]
        raise NothingFitsError("\n".join([*lines, *(f"    {one}" for one in changes)])) from error


def reliefs(
    config: RunConfig, spec: ModelSpec, *, gpus: int, gpu: str, current: Candidate | None = None
) -> list[Relief]:
    """Return changes that make a run fit, cheapest first.

    Args:
        config: The run.
        spec: The dense model.
        gpus: Number of ranks.
        gpu: Name of a GPU in the hardware table.
        current: The layout that does not fit; None if no layout of ``gpus`` ranks fits.
    """
    result: list[Relief] = []
    if current is None:
        for changes in (LESS_STATE, LESS_TRAINED):
            if any(_best("", one, spec, gpus, gpu) for _, one in _changed(config, changes[-1:])):
                result += _first_that_fits(_changed(config, changes), spec, gpus, gpu)
    else:
        result += _settings(config, spec, gpu, current)
        result += _less_state(config, spec, gpu, current)
        result += _best("another layout", config, spec, gpus, gpu, name_layout=True)
    result += _more_gpus(config, spec, gpus, gpu)
    result += _larger_gpus(config, spec, gpus, gpu)
    result += _first_that_fits(_shorter(config), spec, gpus, gpu)
    result += _first_that_fits(_fewer_experts(config), spec, gpus, gpu)
    return result


def _settings(
    config: RunConfig,
    spec: ModelSpec,
    gpu: str,
    current: Candidate,
    work: Workload | None = None,
    change: str = "",
) -> Iterator[Relief]:
    """Yield the least recomputation that fits, for the micro-batch and each half of it.

    Args:
        config: The run, with ``change`` made.
        spec: The dense model.
        gpu: Name of the GPU.
        current: The layout.
        work: The work of a step after ``change``; None: as it is now.
        change: Other settings that were changed before.
    """
    shape, machine = run_shape(config, spec), Machine(gpu_named(gpu), FITTED)
    work, degrees = work or current.work, current.degrees
    later = work.recompute_settings[work.recompute_settings.index(work.recompute) :]
    size = work.micro_batch_size
    while size:
        for recompute in later:
            tried = replace(work, recompute=recompute, micro_batch_size=size)
            memory = peak_memory(shape, tried, degrees)
            if memory.total > machine.gpu.usable_gib or _illegal(config, spec, degrees, tried):
                continue
            time = step_time(shape, tried, degrees, machine)
            yield Relief(
                change=f"{change} {_difference(work, tried)}".strip(),
                mfu=time.mfu,
                tokens_per_second=time.tokens_per_second_per_gpu * degrees.gpus,
                gib=memory.total,
                usable_gib=machine.gpu.usable_gib,
                host_gib=_host_gib(shape, tried, degrees),
            )
            break
        size //= 2


def _less_state(
    config: RunConfig, spec: ModelSpec, gpu: str, current: Candidate
) -> Iterator[Relief]:
    """Yield settings that keep less state in the current layout, each with its first way to fit."""
    for changes in (LESS_STATE, LESS_TRAINED):
        for change, changed in _changed(config, changes):
            own = workload_of(changed)
            work = replace(current.work, state=own.state, frozen=own.frozen, engine=own.engine)
            if work.recompute not in work.recompute_settings:
                continue
            yield from islice(_settings(changed, spec, gpu, current, work, change), 1)


def _changed(
    config: RunConfig, changes: tuple[tuple[str, ...], ...]
) -> Iterator[tuple[str, RunConfig]]:
    """Yield the run after each of the changes that alters it."""
    for overrides in changes:
        if overrides[0] == WITHOUT_EXPERTS[0]:
            frozen = ",".join(dict.fromkeys([*config.train.freeze, "experts"]))
            overrides = (f"train.freeze=[{frozen}]", *overrides[1:])
        changed = overridden(config, overrides)
        if changed != config:
            yield " ".join(overrides), changed


def _host_gib(shape: MoeShape, work: Workload, degrees: Degrees) -> float:
    return estimated_state(shape, work, degrees, pp_rank=0).host / GIB


def _illegal(config: RunConfig, spec: ModelSpec, degrees: Degrees, work: Workload) -> bool:
    return bool(violations(configured(config, degrees, work), spec, degrees.gpus))


def _difference(before: Workload, after: Workload) -> str:
    changes = []
    if after.recompute != before.recompute:
        changes.append(f"train.recompute={after.recompute}")
    if after.micro_batch_size != before.micro_batch_size:
        changes.append(f"train.micro_batch_size={after.micro_batch_size}")
    return " ".join(changes)


def _best(
    change: str,
    config: RunConfig,
    spec: ModelSpec,
    gpus: int,
    gpu: str,
    *,
    name_layout: bool = False,
) -> list[Relief]:
    """Return the best layout after a change, or nothing if none is legal and fits."""
    try:
        result = search(config, spec, gpus=gpus, gpu=gpu, keep=1)
    except ConfigError:
        return []
    best = result.best[0]
    if name_layout:
        change += f" ({best.degrees}, recompute {best.work.recompute})"
    return [
        Relief(
            change=change,
            mfu=best.time.mfu,
            tokens_per_second=best.time.tokens_per_second_per_gpu * gpus,
            gib=best.memory.total,
            usable_gib=result.usable_gib,
            host_gib=_host_gib(run_shape(config, spec), best.work, best.degrees),
        )
    ]


def _more_gpus(config: RunConfig, spec: ModelSpec, gpus: int, gpu: str) -> list[Relief]:
    """Return the smallest power-of-two multiple of the GPUs that fits.

    If there is none, stages of an odd number of layers may help: the numbers then have an odd
    divisor of the layers as a factor.
    """
    doubled = [gpus * 2**doubling for doubling in range(1, MAX_DOUBLINGS + 1)]
    odd = [divisor for divisor in divisors(spec.num_layers) if divisor % 2 and divisor > 1]
    mixed = {factor * 2**power for factor in odd for power in range(3, 15)}
    in_range = sorted(number for number in mixed if gpus < number <= doubled[-1])
    for more in [*doubled, *in_range]:
        batch = -(-config.train.global_batch_size // more) * more
        train = config.train.model_copy(update={"global_batch_size": batch})
        changed = config if more in doubled else config.model_copy(update={"train": train})
        if fitting := _best(f"{more} {gpu} instead of {gpus}", changed, spec, more, gpu):
            return fitting
    return []


def _larger_gpus(config: RunConfig, spec: ModelSpec, gpus: int, gpu: str) -> list[Relief]:
    """Return the smallest GPU of more memory on which the run fits."""
    memory = gpu_named(gpu).hbm_gib
    larger = sorted((o for o in GPUS.values() if o.hbm_gib > 1.1 * memory), key=lambda o: o.hbm_gib)
    for other in larger:
        change = f"{gpus} {other.name} instead of {gpu}"
        if fitting := _best(change, config, spec, gpus, other.name):
            return fitting
    return []


def _first_that_fits(
    changed: Iterator[tuple[str, RunConfig]], spec: ModelSpec, gpus: int, gpu: str
) -> list[Relief]:
    """Return the first of increasingly strong changes that fits."""
    for change, config in changed:
        if fitting := _best(change, config, spec, gpus, gpu):
            return fitting
    return []


def _shorter(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """Yield the run with shorter sequences, and more of them, so that a step has equal tokens."""
    for parts in (2, 4, 8):
        length = config.data.seq_length // parts
        batch = config.train.global_batch_size * parts
        data = config.data.model_copy(update={"seq_length": length})
        train = config.train.model_copy(update={"global_batch_size": batch})
        change = f"data.seq_length={length} train.global_batch_size={batch}"
        yield change, config.model_copy(update={"data": data, "train": train})


def _fewer_experts(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    experts = config.moe.num_moe_experts // 2
    while experts > config.moe.moe_router_topk:
        moe = config.moe.model_copy(update={"num_moe_experts": experts})
        yield f"moe.num_moe_experts={experts}", config.model_copy(update={"moe": moe})
        experts //= 2
