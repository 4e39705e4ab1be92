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


def run_loop(
    state: TrainState,
    *,
    steps: int,
    take_step: Callable[[], StepResult],
    describe: Callable[[StepResult, float], Numbers],
    hooks: Sequence[Hook],
) -> None:
    """Take steps until ``steps`` are taken.

    Args:
        state: Where training is; ``take_step`` advances it.
        steps: Steps of the whole run, those before a resume included.
        take_step: One optimizer step.
        describe: The step's numbers, from its result and its seconds.
        hooks: Called in this order with the step's numbers, to which they may add.
    """
    while state.step < steps:
        start = time.perf_counter()
        result = take_step()
        numbers = describe(result, time.perf_counter() - start)
        for hook in hooks:
            if state.step % hook.interval == 0 or state.step == steps:
                hook.run(numbers)
