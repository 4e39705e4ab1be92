"""The checks: name, function, time limit, and the risk that each retires."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from gpu_checks.session import Session


@dataclass(frozen=True, slots=True)
class Check:
    """One row of the table."""

    name: str
    function: str
    """``module:function`` in this package, imported in the child that runs it."""
    limit: int
    """Seconds after which the child is killed; all limits together are under 480."""
    about: str

    def load(self) -> Callable[[Session], None]:
        """Import the function."""
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(f"gpu_checks.{module}"), name)


PREPARE = Check("prepare", "inputs:prepare", 15, "models and tokens of the checks")
CHECKS = {
    check.name: check
    for check in (
        Check("join", "joining:join", 25, "joining a job: seconds, GPU memory, device_id"),
        Check("placement", "joining:placement", 40, "parameters on the device, one step each"),
        Check("parity", "parity:parity", 45, "transformers' logits; experts equal to the CPU's"),
        Check("curves", "parity:curves", 45, "ten steps beside the CPU's, for every router"),
        Check("resume", "saving:resume", 60, "kill, resume, export; copies between host and GPU"),
        Check("experts", "kernels:experts", 50, "products of experts: values, gradients, speed"),
        Check("attention", "kernels:attention", 35, "attention: kernel, speed, memory"),
        Check("loss", "kernels:loss", 25, "cross entropy over 128k tokens"),
        Check("profile", "profiling:profile_step", 30, "where a step's time goes, and who waits"),
        Check("fill", "speed:fill", 20, "upcycling beside reading the file into the GPU"),
        Check("speed", "speed:speed", 90, "bench beside plan and beside transformers' Mixtral"),
    )
}  # fmt: skip
"""In order of risk retired per second."""
