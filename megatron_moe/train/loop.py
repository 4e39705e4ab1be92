"""The training loop: take steps and run the hooks between them, in order."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_moe.train.state import TrainState
from megatron_moe.train.step import StepResult

Numbers = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Hook:
    """A function to run every ``interval`` steps and after the last step."""

    interval: int
    run: Callable[[Numbers], None]
    when_stopped: bool = True
    """Whether a step after which the run is asked to stop counts as the last one."""


def run_loop(
    state: TrainState,
    *,
    steps: int,
    take_step: Callable[[], StepResult],
    wait: Callable[[], object],
    describe: Callable[[StepResult, float], Numbers],
    hooks: Sequence[Hook],
    keeps: Callable[[StepResult], bool],
    stopping: Callable[[], bool],
) -> None:
    """Take steps until ``steps`` are done or the run is asked to stop.

    Args:
        state: Training state; ``take_step`` advances it.
        steps: Steps of the whole run, including those before a resume.
        take_step: Takes one optimizer step.
        wait: Returns when the device has finished the step. Without it, the time of the update
            would be counted for no step: on CUDA ``take_step`` returns while kernels still run. It
            adds no extra wait, because the step's numbers are then read from the device anyway.
        describe: Returns the step's numbers, given its result and its seconds.
        hooks: Called in this order with the step's numbers; they may add to them.
        keeps: Returns whether the step counts; if not, it has already restored ``state``.
        stopping: Called after every step; returns whether this process stops after it.
    """
    stopped = False
    while state.step < steps and not stopped:
        start = time.perf_counter()
        result = take_step()
        wait()
        if not keeps(result):
            continue
        numbers = describe(result, time.perf_counter() - start)
        stopped = stopping()
        for hook in hooks:
            last = state.step == steps or (stopped and hook.when_stopped)
            if state.step % hook.interval == 0 or last:
                hook.run(numbers)
