"""Wait for a device to finish its work, and measure the time of each stage."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def waiter(device: torch.device) -> Callable[[], object]:
    """Return a function that returns once ``device`` has finished all work issued so far."""
    return torch.cuda.synchronize if device.type == "cuda" else _nothing


def _nothing() -> None:
    """Do nothing: on a CPU the work is finished when the call returns."""


class StageClock:
    """Measure the time between stages of one rank's work without waiting for the device.

    On a CPU this reads the wall clock. On CUDA the host runs ahead of the device, so a host clock
    would attribute a stage's kernels to whichever stage waits for them first. There each boundary
    is an event on the current stream: recording one takes microseconds and does not wait; only
    `seconds` waits, for the last event. A stage's time then includes the GPU's idle time in it.

    Args:
        device: The device that this rank computes on.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._boundaries: list[tuple[str, Any]] = []

    def start(self, stage: str) -> None:
        """Discard all measurements, and begin ``stage``."""
        self._boundaries.clear()
        self.enter(stage)

    def enter(self, stage: str) -> None:
        """End the current stage, and begin ``stage``."""
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
