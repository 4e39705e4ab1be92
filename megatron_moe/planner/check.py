"""``megatron-moe plan CONFIG --check``: predict time and memory of the layout of CONFIG."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from megatron_moe.config.run import RunConfig
from megatron_moe.hf.spec import ModelSpec
from megatron_moe.planner.calibration import FITTED, Calibration
from megatron_moe.planner.hardware import gpu_named
from megatron_moe.planner.layer import Machine
from megatron_moe.planner.memory import peak_memory
from megatron_moe.planner.relief import reliefs
from megatron_moe.planner.search import Candidate, configured
from megatron_moe.planner.shape import MoeShape, run_shape
from megatron_moe.planner.teacher import with_teacher
from megatron_moe.planner.time import step_time
from megatron_moe.planner.workload import Degrees, Workload, degrees_of, workload_of
from megatron_moe.rules.check import violations

MIN_SPEEDUP = 1.01
"""Minimum predicted speedup for a change of one setting to be suggested."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """Result of checking one layout."""

    legal: bool
    """Whether the layout breaks no rule of ``rules/check.py``."""
    fits: bool
    """Whether the layout is legal and its predicted memory is within the GPU's usable memory."""
    reasons: tuple[str, ...]
    """Messages of all broken rules, or by how many GiB the layout does not fit."""
    candidate: Candidate | None
    """The prediction; None if the layout is not legal."""
    advice: tuple[str, ...]
    """Changes of one setting that fit and are predicted to be faster."""
    reliefs: tuple[str, ...] = ()
    """If the layout does not fit: changes after which the run does, cheapest first."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values for ``--json``; numbers are null if the layout is not legal."""
        predicted = self.candidate.to_json() if self.candidate else {}
        numbers = (
            "mfu", "mfu_full_attention", "tokens_per_second_per_gpu", "memory_gib", "step_seconds",
            "seconds_by_part", "limit", "layout",
        )  # fmt: skip
        return {
            "legal": self.legal,
            "fits": self.fits,
            "reasons": list(self.reasons),
            **{name: predicted.get(name) for name in numbers},
            "advice": list(self.advice),
            "reliefs": list(self.reliefs),
        }


def check_layout(
    config: RunConfig,
    spec: ModelSpec,
    *,
    gpus: int,
    gpu: str = "h100",
    constants: Calibration = FITTED,
) -> CheckResult:
    """Check the layout, batch and model of a configuration on ``gpus`` ranks.

    Raises:
        ConfigError: ``gpu`` is not in the hardware table.
    """
    machine = Machine(gpu_named(gpu), constants)
    if broken_rules := violations(config, spec, gpus):
        return CheckResult(
            legal=False, fits=False, reasons=tuple(broken_rules), candidate=None, advice=()
        )
    shape, degrees = run_shape(config, spec), degrees_of(config, gpus=gpus)
    candidate = predict_candidate(
        shape, with_teacher(workload_of(config), config, spec), degrees, machine
    )
    excess = candidate.memory.total - machine.gpu.usable_gib
    reasons = (_excess(candidate, excess, machine),) if excess > 0 else ()
    return CheckResult(
        legal=True,
        fits=excess <= 0,
        reasons=reasons,
        candidate=candidate,
        advice=tuple(_advice(config, spec, shape, candidate, machine)),
        reliefs=tuple(map(str, reliefs(config, spec, gpus=gpus, gpu=gpu, current=candidate)))
        if excess > 0
        else (),
    )


def predict_candidate(
    shape: MoeShape, work: Workload, degrees: Degrees, machine: Machine
) -> Candidate:
    """Predict time and memory of one layout and batch, whether or not it fits."""
    return Candidate(
        degrees=degrees,
        work=work,
        time=step_time(shape, work, degrees, machine),
        memory=peak_memory(shape, work, degrees),
    )


def _excess(candidate: Candidate, excess: float, machine: Machine) -> str:
    parts = sorted(candidate.memory.to_json().items(), key=lambda part: -part[1])
    largest = ", ".join(f"{name} {gib:.1f}" for name, gib in parts[1:4])
    return (
        f"a rank needs {candidate.memory.total:.1f} GiB, but only {machine.gpu.usable_gib:.1f} of "
        f"the {machine.gpu.hbm_gib:.1f} GiB of one {machine.gpu.name} are usable: {excess:.1f} GiB "
        f"too many.\n  largest parts, GiB: {largest}"
    )


def _advice(
    config: RunConfig, spec: ModelSpec, shape: MoeShape, current: Candidate, machine: Machine
) -> Iterator[str]:
    """Yield the three best changes of one setting."""
    better: list[tuple[float, str]] = []
    for change, degrees, work in _neighbors(shape, current):
        if violations(configured(config, degrees, work), spec, degrees.gpus):
            continue
        changed = predict_candidate(shape, work, degrees, machine)
        gain = changed.time.mfu / current.time.mfu
        if changed.memory.total <= machine.gpu.usable_gib and gain > MIN_SPEEDUP:
            text = f"{change}: {changed.time.mfu:.1f}% MFU, {changed.memory.total:.1f} GiB"
            better.append((gain, text))
    yield from (text for _, text in sorted(better, reverse=True)[:3])


def _neighbors(shape: MoeShape, current: Candidate) -> Iterator[tuple[str, Degrees, Workload]]:
    """Yield layouts with one degree or the micro-batch halved or doubled, or with maximum vpp."""
    for axis in (f.name for f in fields(Degrees) if f.name not in ("gpus", "split")):
        value = getattr(current.degrees, axis)
        values = {value * 2, max(1, value // 2)}
        if axis == "vpp":
            values.add(shape.num_layers // current.degrees.pp)
        for other in sorted(values - {value}):
            yield f"{axis} {other}", replace(current.degrees, **{axis: other}), current.work
    for size in (current.work.micro_batch_size * 2, current.work.micro_batch_size // 2):
        if size:
            work = replace(current.work, micro_batch_size=size)
            yield f"micro_batch_size {size}", current.degrees, work
