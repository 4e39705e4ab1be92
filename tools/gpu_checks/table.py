"""The checks: name, function, time limit, and the question that each answers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Check:
    """One row of the table."""

    name: str
    function: str
    """``module:function``, imported in the child that runs it."""
    limit: int
    """Seconds after which the child is killed; all limits together are at most 480."""
    about: str


PREPARE = Check("prepare", "gpu_checks.inputs:prepare", 15, "models and tokens of the checks")
CHECKS = {
    check.name: check
    for check in (
        Check("join", "gpu_checks.joining:join", 35, "joining a job: seconds, GPU memory"),
        Check("placement", "gpu_checks.joining:placement", 35, "are parameters on the device?"),
        Check("parity", "gpu_checks.parity:parity", 45, "transformers' logits, the CPU's experts"),
        Check("curves", "gpu_checks.parity:curves", 40, "ten steps of each router as on a CPU"),
        Check("resume", "gpu_checks.saving:resume", 50, "kill, resume, export; copies to the host"),
        Check("experts", "gpu_checks.kernels:experts", 45, "products of experts: errors and speed"),
        Check("attention", "gpu_checks.kernels:attention", 45, "attention: kernel, speed, memory"),
        Check("loss", "gpu_checks.kernels:loss", 30, "cross entropy over 128k tokens"),
        Check("profile", "gpu_checks.profiling:profile_step", 35, "a step's kernels and waits"),
        Check("fill", "gpu_checks.filling:fill", 20, "upcycling beside reading into the GPU"),
        Check("speed", "gpu_checks.speed:speed", 85, "bench beside plan and beside transformers"),
    )
}
"""In order of risk retired per second."""
