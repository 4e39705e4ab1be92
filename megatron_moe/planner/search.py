"""``megatron-moe plan``: rank layouts, micro-batch sizes and recomputation settings by speed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from megatron_moe.config.run import RunConfig
from megatron_moe.errors import ConfigError
from megatron_moe.hf.spec import ModelSpec
from megatron_moe.planner.calibration import FITTED, Calibration
from megatron_moe.planner.candidates import MICRO_BATCH_SIZES, chunkings, layouts
from megatron_moe.planner.frontier import Family, Frontier, Setting
from megatron_moe.planner.hardware import gpu_named
from megatron_moe.planner.layer import Machine
from megatron_moe.planner.memory import FRAMEWORK_GIB, GIB, RankMemory, estimated_state, peak_memory
from megatron_moe.planner.shape import MoeShape, run_shape
from megatron_moe.planner.teacher import with_teacher
from megatron_moe.planner.time import StepTime
from megatron_moe.planner.workload import Degrees, Workload, workload_of
from megatron_moe.rules.check import violations

MAX_SHOWN_TOO_LARGE = 5
MAX_ILLEGAL_SETTINGS = 20
"""Number of settings that may break rules before any legal one; then the configuration itself,
not the layout, is assumed to be illegal."""


class NothingFitsError(ConfigError):
    """Legal layouts exist, but none fits into the memory of the GPUs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A layout with its batch and its predicted time and memory."""

    degrees: Degrees
    work: Workload
    time: StepTime
    memory: RankMemory

    def to_json(self) -> dict[str, Any]:
        """Return plain values for ``--json``."""
        return {
            "layout": self.degrees.to_json(),
            "micro_batch_size": self.work.micro_batch_size,
            "recompute": self.work.recompute,
            "mfu": self.time.mfu,
            "mfu_full_attention": self.time.mfu_full_attention,
            "tokens_per_second_per_gpu": self.time.tokens_per_second_per_gpu,
            "step_seconds": self.time.step_seconds,
            "seconds_by_part": self.time.parts,
            "limit": self.time.limit,
            "memory_gib": self.memory.to_json(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class TooLarge:
    """A setting that would be faster but does not fit into memory."""

    degrees: Degrees
    work: Workload
    mfu: float
    excess_gib: float
    """Memory that a rank needs beyond the usable memory."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values for ``--json``."""
        return {
            "layout": self.degrees.to_json(),
            "micro_batch_size": self.work.micro_batch_size,
            "recompute": self.work.recompute,
            "mfu": self.mfu,
            "excess_gib": self.excess_gib,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """The fastest layouts that fit, and faster ones that do not."""

    gpu: str
    gpus: int
    gpus_per_node: int
    usable_gib: float
    """Memory of a GPU that a predicted layout may use."""
    num_legal: int
    """Number of legal settings of tp, cp, pp, vpp, ep, etp and micro-batch size, regardless of
    recomputation."""
    num_state_too_large: int
    """Number of these settings whose weights, gradients and optimizer state alone do not fit."""
    best: tuple[Candidate, ...]
    """The fastest settings: one for each tp, cp, pp, ep and etp, with its best vpp, micro-batch
    size and recomputation."""
    too_large: tuple[TooLarge, ...]
    """The fastest settings whose activations do not fit."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values for ``--json``."""
        return {
            "gpu": self.gpu,
            "gpus": self.gpus,
            "usable_gib": self.usable_gib,
            "num_legal": self.num_legal,
            "num_state_too_large": self.num_state_too_large,
            "best": [candidate.to_json() for candidate in self.best],
            "too_large": [one.to_json() for one in self.too_large],
        }


def search(
    config: RunConfig,
    spec: ModelSpec,
    *,
    gpus: int,
    gpu: str = "h100",
    keep: int = 10,
    constants: Calibration = FITTED,
) -> SearchResult:
    """Rank all layouts of a configuration on ``gpus`` ranks by predicted tokens per second.

    The layout and micro-batch size of ``config`` are ignored; its model, global batch size and
    sequence length are used.

    Args:
        config: The run.
        spec: The dense model that the run starts from.
        gpus: Number of ranks.
        gpu: Name of a GPU in the hardware table.
        keep: Number of layouts to return.
        constants: Constants of the time model.

    Raises:
        ConfigError: The GPU is unknown, or no layout is legal.
        NothingFitsError: No legal layout fits.
    """
    shape, machine = run_shape(config, spec), Machine(gpu_named(gpu), constants)
    space = _space(shape, with_teacher(workload_of(config), config, spec), gpus, machine)
    if not space.num_legal:
        broken_rules = violations(config, spec, gpus)
        raise ConfigError(
            "\n".join(
                [f"no layout of {gpus} GPUs is legal for this model and batch", *broken_rules]
            )
        )
    best, too_large = _walk(config, spec, space, Frontier(shape, machine, space.families), keep)
    if not best:
        if broken_rules := _broken_by_all(config, spec, shape, gpus, machine):
            raise ConfigError("\n".join(broken_rules))
        raise NothingFitsError(_nothing_fits(space, too_large))
    return SearchResult(
        gpu=gpu,
        gpus=gpus,
        gpus_per_node=machine.gpu.gpus_per_node,
        usable_gib=machine.gpu.usable_gib,
        num_legal=space.num_legal,
        num_state_too_large=space.num_state_too_large,
        best=tuple(best),
        too_large=tuple(too_large),
    )


def _broken_by_all(
    config: RunConfig, spec: ModelSpec, shape: MoeShape, gpus: int, machine: Machine
) -> list[str]:
    """Return the rules that the run breaks under every layout, whether it fits or not."""
    work = workload_of(config)
    tried = list(
        layouts(
            shape,
            gpus=gpus,
            sequence_length=work.sequence_length,
            gpus_per_node=machine.gpu.gpus_per_node,
        )
    )
    some = tried[:: -(-len(tried) // MAX_ILLEGAL_SETTINGS)]
    broken = [violations(configured(config, one, work), spec, gpus) for one in some]
    return [rule for rule in broken[0] if all(rule in others for others in broken)]


def configured(config: RunConfig, degrees: Degrees, work: Workload) -> RunConfig:
    """Return the configuration with another layout and micro-batch size."""
    train = config.train.model_copy(update={"micro_batch_size": work.micro_batch_size})
    return config.model_copy(update={"parallel": degrees.parallel(), "train": train})


@dataclass(slots=True)
class _Space:
    """The layouts that a search considers, by family."""

    shape: MoeShape
    gpus: int
    machine: Machine
    families: list[Family]
    num_legal: int
    num_state_too_large: int
    least_state_gib: float


def _space(shape: MoeShape, work: Workload, gpus: int, machine: Machine) -> _Space:
    """Collect legal layouts by family; count and skip those whose model state is too large."""
    families: dict[tuple[int, ...], Family] = {}
    space = _Space(shape, gpus, machine, [], 0, 0, float("inf"))
    sizes = [replace(work, micro_batch_size=size) for size in MICRO_BATCH_SIZES]
    for degrees in layouts(
        shape,
        gpus=gpus,
        sequence_length=work.sequence_length,
        gpus_per_node=machine.gpu.gpus_per_node,
    ):
        state = _state_gib(shape, degrees, work)
        space.least_state_gib = min(space.least_state_gib, state)
        for sized in sizes:
            if work.global_batch_size % (sized.micro_batch_size * degrees.dp):
                continue
            batches = sized.micro_batches(degrees)
            number = len(chunkings(shape, degrees, micro_batches=batches))
            space.num_legal += number
            if state > machine.gpu.usable_gib:
                space.num_state_too_large += number
                continue
            key = (degrees.tp, degrees.cp, degrees.ep, degrees.etp, sized.micro_batch_size)
            families.setdefault(key, Family(sized, [])).degrees.append(degrees)
    space.families = list(families.values())
    return space


def _state_gib(shape: MoeShape, degrees: Degrees, work: Workload) -> float:
    """Return the memory needed besides activations: weights, gradients, optimizer, framework."""
    state = estimated_state(shape, work, degrees, pp_rank=0)
    return (state.weights + state.gradients + state.optimizer) / GIB + FRAMEWORK_GIB


def _walk(
    config: RunConfig, spec: ModelSpec, space: _Space, frontier: Frontier, keep: int
) -> tuple[list[Candidate], list[TooLarge]]:
    """Visit settings from the fastest on until enough fit.

    Raises:
        ConfigError: The first `MAX_ILLEGAL_SETTINGS` settings all break rules, so the cause is the
            configuration rather than their layouts.
    """
    best: list[Candidate] = []
    too_large: list[TooLarge] = []
    num_broken, usable_gib = 0, space.machine.gpu.usable_gib
    seen: set[Degrees] = set()
    for setting in frontier:
        layout = replace(setting.degrees, vpp=1)
        if layout in seen:
            continue
        memory = peak_memory(space.shape, setting.work, setting.degrees)
        if memory.total > usable_gib:
            last = not frontier.add_with_more_recompute(setting)
            if len(too_large) < MAX_SHOWN_TOO_LARGE or last:
                too_large.append(_too_large(setting, memory.total - usable_gib))
            continue
        if broken_rules := violations(
            configured(config, setting.degrees, setting.work), spec, space.gpus
        ):
            num_broken += 1
            if num_broken == MAX_ILLEGAL_SETTINGS and not best:
                raise ConfigError("\n".join(broken_rules))
            continue
        seen.add(layout)
        best.append(
            Candidate(degrees=setting.degrees, work=setting.work, time=setting.time, memory=memory)
        )
        if len(best) == keep:
            break
    return best, too_large[:MAX_SHOWN_TOO_LARGE] if best else too_large


def _too_large(setting: Setting, excess_gib: float) -> TooLarge:
    return TooLarge(
        degrees=setting.degrees,
        work=setting.work,
        mfu=setting.time.mfu,
        excess_gib=excess_gib,
    )


def _nothing_fits(space: _Space, too_large: list[TooLarge]) -> str:
    gpu = space.machine.gpu
    if not too_large:
        return (
            f"no layout of {space.gpus} {gpu.name} holds the model: weights, gradients and "
            f"optimizer state need at least {space.least_state_gib:.1f} GiB a rank, "
            f"{space.least_state_gib - gpu.usable_gib:.1f} GiB more than usable."
        )
    closest = min(too_large, key=lambda one: one.excess_gib)
    return (
        f"no layout of {space.gpus} {gpu.name} holds the model and a micro-batch: the closest, "
        f"{closest.degrees} with recompute {closest.work.recompute}, needs "
        f"{closest.excess_gib:.1f} GiB more than usable on a rank."
    )
