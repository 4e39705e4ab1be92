"""The training loop: steps, and what happens between them, in the order it happens."""

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
    """Something done after a step: every ``interval`` steps and after the last one."""

    interval: int
    run: Callable[[Numbers], None]
    when_stopped: bool = True
    """Whether the step after which the run was told to stop counts as the last."""


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
    """Take steps until ``steps`` are taken, or the run is told to stop.

    Args:
        state: Where training is; ``take_step`` advances it.
        steps: Steps of the whole run, those before a resume included.
        take_step: One optimizer step.
        wait: Returns once the device has done that step. Without it, the time of the update would
            belong to no step: on CUDA the call returns while kernels still run. It adds no wait of
            its own, since the numbers that follow are read from the device anyway.
        describe: The step's numbers, from its result and its seconds.
        hooks: Called in this order with the step's numbers, to which they may add.
        keeps: Whether the step happened; where it says no, it has set ``state`` back.
        stopping: Asked after every step: whether it was the last one of this process.
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
