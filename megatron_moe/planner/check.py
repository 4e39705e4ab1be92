"""``megatron-moe plan CONFIG --check``: what is to be expected of the one layout CONFIG names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from megatron_moe.config.run import RunConfig
from megatron_moe.hf.spec import DenseSpec
from megatron_moe.planner.calibration import FITTED
from megatron_moe.planner.hardware import gpu_named
from megatron_moe.planner.layer import Machine
from megatron_moe.planner.memory import peak_memory
from megatron_moe.planner.search import Candidate, configured
from megatron_moe.planner.shape import MoeShape, upcycled_shape
from megatron_moe.planner.time import step_time
from megatron_moe.planner.workload import Degrees, Workload, degrees_of, workload_of
from megatron_moe.rules.check import violations

WORTH_SAYING = 1.01
"""A neighbour is mentioned when it is faster by this factor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """Verdict on one layout."""

    legal: bool
    """No rule of ``rules/check.py`` is broken."""
    fits: bool
    """Legal, and the predicted memory is within the GPU's."""
    reasons: tuple[str, ...]
    """Every broken rule; what does not fit, by how many GiB."""
    candidate: Candidate | None
    """The prediction; None for a layout that is not legal."""
    advice: tuple[str, ...]
    """Changes of one setting that fit and are predicted to be faster."""

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``--json``; numbers are null for a layout that is not legal."""
        predicted = self.candidate.to_json() if self.candidate else {}
        numbers = (
            "mfu", "tokens_per_second_per_gpu", "memory_gib", "step_seconds", "seconds_by_part",
            "limit", "layout",
        )  # fmt: skip
        return {
            "legal": self.legal,
            "fits": self.fits,
            "reasons": list(self.reasons),
            **{name: predicted.get(name) for name in numbers},
            "advice": list(self.advice),
        }


def check_layout(
    config: RunConfig, spec: DenseSpec, *, gpus: int, gpu: str = "h100"
) -> CheckResult:
    """Judge the layout, batch and model of a configuration on ``gpus`` ranks.

    Raises:
        ConfigError: ``gpu`` is not in the hardware table.
    """
    machine = Machine(gpu_named(gpu), FITTED)
    if broken := violations(config, spec, gpus):
        return CheckResult(
            legal=False, fits=False, reasons=tuple(broken), candidate=None, advice=()
        )
    shape, degrees = upcycled_shape(spec, config.moe), degrees_of(config, gpus=gpus)
    candidate = predict_candidate(shape, workload_of(config), degrees, machine)
    excess = candidate.memory.total - machine.gpu.usable_gib
    reasons = (_excess(candidate, excess, machine),) if excess > 0 else ()
    return CheckResult(
        legal=True,
        fits=excess <= 0,
        reasons=reasons,
        candidate=candidate,
        advice=tuple(_advice(config, spec, shape, candidate, machine)),
    )


def predict_candidate(
    shape: MoeShape, work: Workload, degrees: Degrees, machine: Machine
) -> Candidate:
    """Time and memory of one setting, whether or not it fits."""
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
        f"a rank needs {candidate.memory.total:.1f} GiB and of one {machine.gpu.name}'s "
        f"{machine.gpu.hbm_gib:.1f} are {machine.gpu.usable_gib:.1f} usable: {excess:.1f} GiB too "
        f"many.\n  largest parts, GiB: {largest}"
    )


def _advice(
    config: RunConfig, spec: DenseSpec, shape: MoeShape, here: Candidate, machine: Machine
) -> Iterator[str]:
    """The three best single changes."""
    better: list[tuple[float, str]] = []
    for change, degrees, work in _neighbours(shape, here):
        if violations(configured(config, degrees, work), spec, degrees.gpus):
            continue
        there = predict_candidate(shape, work, degrees, machine)
        gain = there.time.mfu / here.time.mfu
        if there.memory.total <= machine.gpu.usable_gib and gain > WORTH_SAYING:
            text = f"{change}: {there.time.mfu:.1f}% MFU, {there.memory.total:.1f} GiB"
            better.append((gain, text))
    yield from (text for _, text in sorted(better, reverse=True)[:3])


def _neighbours(shape: MoeShape, here: Candidate) -> Iterator[tuple[str, Degrees, Workload]]:
    """One degree or the micro-batch halved or doubled, and the finest interleaving."""
    for axis in (f.name for f in fields(Degrees) if f.name != "gpus"):
        value = getattr(here.degrees, axis)
        values = {value * 2, max(1, value // 2)}
        if axis == "vpp":
            values.add(shape.num_layers // here.degrees.pp)
        for other in sorted(values - {value}):
            yield f"{axis} {other}", replace(here.degrees, **{axis: other}), here.work
    for size in (here.work.micro_batch_size * 2, here.work.micro_batch_size // 2):
        if size:
            work = replace(here.work, micro_batch_size=size)
            yield f"micro_batch_size {size}", here.degrees, work
