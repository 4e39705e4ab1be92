"""The checks: name, function, time limit, and the risk that each retires."""

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
        Check(
            "join", "gpu_checks.joining:join", 40, "joining a job: seconds, GPU memory, device_id"
        ),
        Check(
            "placement",
            "gpu_checks.joining:placement",
            40,
            "parameters on the device, one step each",
        ),
        Check(
            "parity",
            "gpu_checks.parity:parity",
            45,
            "transformers' logits; experts equal to the CPU's",
        ),
        Check(
            "curves", "gpu_checks.parity:curves", 40, "ten steps beside the CPU's, for every router"
        ),
        Check(
            "resume",
            "gpu_checks.saving:resume",
            55,
            "kill, resume, export; copies between host and GPU",
        ),
        Check(
            "experts",
            "gpu_checks.kernels:experts",
            50,
            "products of experts: values, gradients, speed",
        ),
        Check("attention", "gpu_checks.kernels:attention", 35, "attention: kernel, speed, memory"),
        Check("loss", "gpu_checks.kernels:loss", 25, "cross entropy over 128k tokens"),
        Check(
            "profile",
            "gpu_checks.profiling:profile_step",
            30,
            "where a step's time goes, and who waits",
        ),
        Check(
            "fill", "gpu_checks.filling:fill", 20, "upcycling beside reading the file into the GPU"
        ),
        Check(
            "speed",
            "gpu_checks.speed:speed",
            85,
            "bench beside plan and beside transformers' Mixtral",
        ),
    )
}
"""In order of risk retired per second."""
