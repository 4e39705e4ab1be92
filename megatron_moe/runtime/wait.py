"""Wait until a device has done what it was asked to do, and time what it does meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def waiter(device: torch.device) -> Callable[[], object]:
    """Return a function that returns once ``device`` has finished all work issued so far."""
    return torch.cuda.synchronize if device.type == "cuda" else _nothing


def _nothing() -> None:
    """Return at once: a CPU has finished its work when the call that asked for it returns."""


class StageClock:
    """Measure the time between stages of one rank's work without waiting for the device.

    On a CPU these are readings of the wall clock. On CUDA the host runs ahead of the device, so a
    host clock would book a stage's kernels to whichever stage waits for them first. There each
    boundary is an event on the current stream: recording one takes microseconds and waits for
    nothing, and only `seconds` waits, for the last event. A stage's time then includes what the
    GPU idled in it.

    Args:
        device: The device that this rank computes on.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._boundaries: list[tuple[str, Any]] = []

    def start(self, stage: str) -> None:
        """Forget what was measured; ``stage`` begins now."""
        self._boundaries.clear()
        self.enter(stage)

    def enter(self, stage: str) -> None:
        """End the stage that runs, and begin ``stage``."""
        self._boundaries.append((stage, self._now()))

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each stage that has ended since `start`."""
        result: dict[str, float] = {}
        if self._cuda:
            self._boundaries[-1][1].synchronize()
        for (stage, begin), (_, end) in zip(self._boundaries, self._boundaries[1:], strict=False):
            spent = begin.elapsed_time(end) / 1000 if self._cuda else end - begin
            result[stage] = result.get(stage, 0.0) + spent
        return result

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
