"""What a run survives: signals, steps whose numbers are not finite, loss spikes.

What ranks decide here they decide alike: a signal that reached any rank counts for all of them at
the next step boundary, and losses and gradient norms are the same numbers everywhere.
"""

from __future__ import annotations

import math
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Literal, Self

import torch.distributed as dist

from megatron_moe.config.run import Guard as GuardConfig
from megatron_moe.errors import JobError
from megatron_moe.runtime.together import any_rank
from megatron_moe.train.verdict import STAGES
from megatron_moe.train.watch import Watch

SPIKE_WINDOW = 16
"""Steps whose mean loss a spike is measured against; no spike is seen before there are as many."""

Fate = Literal["keep", "skip", "roll back"]
"""What becomes of a step: its update is made, or is not, or those before it are undone too."""


class Signals:
    """Notes SIGTERM, SIGUSR1 and SIGUSR2 instead of dying of them, while ``with`` is open."""

    STOP = (signal.SIGTERM, signal.SIGUSR1)
    REPORT = signal.SIGUSR2

    def __init__(self) -> None:
        self.stop: str | None = None
        """Name of the signal that asked this rank to save and end."""
        self.report = False
        """Whether this rank was asked how long its stages take."""

    def __enter__(self) -> Self:
        self._before = {
            number: signal.signal(number, self._note) for number in (*self.STOP, self.REPORT)
        }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == self.REPORT:
            self.report = True
        else:
            self.stop = signal.Signals(number).name

    def agree(self) -> tuple[bool, bool]:
        """Whether any rank was asked to stop, and whether any was asked for a report."""
        stop, report = any_rank(self.stop is not None, self.report)
        self.report = False
        return stop, report


class Judge:
    """Decides over each step by its loss and gradient norm, before the weights are changed."""

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._skipped: list[int] = []
        self._roll_backs = 0
        self._losses: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def __call__(self, *, step: int, loss: float, grad_norm: float) -> Fate:
        """What becomes of the step.

        Raises:
            JobError: Too many steps in a row were skipped, or the loss spikes again and again.
        """
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._skipped.append(step)
            if len(self._skipped) > self._config.max_skipped_steps:
                raise JobError(_not_finite(self._skipped, loss, grad_norm))
            return "skip"
        self._skipped.clear()
        if self._spikes(loss):
            self._roll_backs += 1
            if self._roll_backs > self._config.max_skipped_steps:
                raise JobError(
                    f"the loss of step {step} ({loss:.4f}) spikes again after "
                    f"{self._roll_backs - 1} roll-backs: other batches do not help.\n"
                    "  lower optimizer.lr, or look at the data"
                )
            self._losses.clear()
            return "roll back"
        self._losses.append(loss)
        return "keep"

    def _spikes(self, loss: float) -> bool:
        factor = self._config.spike_factor
        if factor is None or len(self._losses) < SPIKE_WINDOW:
            return False
        return loss > factor * sum(self._losses) / SPIKE_WINDOW


def _not_finite(steps: list[int], loss: float, grad_norm: float) -> str:
    return (
        f"{len(steps)} steps in a row ({steps[0]} to {steps[-1]}) had no finite loss or gradient; "
        f"the last: loss {loss}, gradient norm {grad_norm}. The weights are those before step "
        f"{steps[0]}; guard.max_skipped_steps ({len(steps) - 1}) is how many are skipped.\n"
        "  look at the data of these steps, lower optimizer.lr, or go back to an older checkpoint "
        "by its name in checkpoints/latest"
    )


def stage_table(seconds: dict[str, float], cpu_seconds: float) -> str:
    """Seconds of every rank in each stage of the last step, one line a rank; all ranks call it.

    Seconds are the device's: of the wall clock on CPU, between events of the stream on CUDA
    (runtime/wait.py). A rank that waits for others spends wall time and no CPU time, so on CPU the
    straggler is the rank with the most CPU seconds, which the last line names. On CUDA that line
    names the rank whose host works most, and says nothing about its GPU.
    """
    mine: dict[str, Any] = {"host": socket.gethostname(), "cpu": cpu_seconds, **seconds}
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    stages = [stage for stage in STAGES if any(stage in one for one in every)]
    lines = ["  ".join([f"{'rank':>5}", *(f"{name:>9}" for name in [*stages, "CPU"]), "host"])]
    for rank, one in enumerate(every):
        numbers = [one.get(stage, 0.0) for stage in stages] + [one["cpu"]]
        lines.append("  ".join([f"{rank:>5}", *(f"{n:>9.3f}" for n in numbers), one["host"]]))
    busiest = max(range(len(every)), key=lambda rank: every[rank]["cpu"])
    return "\n".join([*lines, f"most CPU seconds: rank {busiest}"])


class Boundary:
    """What is asked of a run from outside, looked at between two steps."""

    def __init__(self, signals: Signals, watch: Watch, say: Callable[[str], None]) -> None:
        self._signals, self._watch, self._say = signals, watch, say
        self._cpu_start = time.process_time()
        self.stopped = False
        """Whether the step just taken is the last of this process."""

    def stopping(self) -> bool:
        """Whether any rank was told to save and end; and, where asked, a table of the last step."""
        self.stopped, report = self._signals.agree()
        if report:
            self._say(stage_table(self._watch.seconds(), time.process_time() - self._cpu_start))
        self._watch.reset_seconds()
        self._cpu_start = time.process_time()
        return self.stopped
