"""Handle signals, steps with non-finite numbers and loss spikes.

All ranks reach the same decision: a signal that any rank received takes effect on all of them at
the next step boundary, and losses and gradient norms are the same numbers on every rank.
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
"""Number of previous steps whose mean loss is the baseline; before that, no spike is detected."""

Decision = Literal["keep", "skip", "roll back"]
"""Action for a step: apply its update, skip the update, or also undo the steps before it."""


class Signals:
    """Record signals instead of exiting, inside a ``with`` block.

    SIGINT is Ctrl-C, SIGHUP a terminal that was closed. Signals that are ignored stay ignored, as
    nohup wants SIGHUP.
    """

    STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    REPORT = signal.SIGUSR2

    def __init__(self) -> None:
        self.stop: str | None = None
        """Name of the signal that asked this rank to save and stop."""
        self.report = False
        """Whether a signal asked this rank for a table of stage times."""

    def __enter__(self) -> Self:
        numbers = [
            number
            for number in (*self.STOP, self.REPORT)
            if signal.getsignal(number) is not signal.SIG_IGN
        ]
        self._before = {number: signal.signal(number, self._note) for number in numbers}
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
        """Return whether any rank was asked to stop, and whether any was asked for a report."""
        stop, report = any_rank(self.stop is not None, self.report)
        self.report = False
        return stop, report


class StepGuard:
    """Decide about each step from its loss and gradient norm, before the weights change."""

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._skipped: list[int] = []
        self._roll_backs = 0
        self._losses: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def __call__(self, *, step: int, loss: float, grad_norm: float) -> Decision:
        """Return whether to keep the step, skip it or roll back.

        Raises:
            JobError: Too many consecutive steps were skipped, or the loss keeps spiking.
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
                    f"the loss of step {step} ({loss:.4f}) spiked again after "
                    f"{self._roll_backs - 1} roll-backs: skipping batches does not help.\n"
                    "  lower optimizer.lr, or check the data"
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
        f"{len(steps)} consecutive steps ({steps[0]} to {steps[-1]}) had a non-finite loss or "
        f"gradient; guard.max_skipped_steps ({len(steps) - 1}) limits how many are skipped. Last "
        f"step: loss {loss}, gradient norm {grad_norm}. The weights are those before step "
        f"{steps[0]}.\n"
        "  check the data of these steps, lower optimizer.lr, or write the name of an older "
        "checkpoint into checkpoints/latest to resume from it"
    )


def stage_table(seconds: dict[str, float], cpu_seconds: float) -> str:
    """Return a table of each rank's seconds in each stage of the last step, one line per rank.

    All ranks must call it. On CPU the seconds are wall time; on CUDA they are the time between
    events of the stream (runtime/wait.py). A rank that waits for others spends wall time but no CPU
    time, so on CPU the straggler is the rank with the most CPU seconds, which the last line names.
    On CUDA that line names the rank with the busiest host, and says nothing about its GPU.
    """
    own: dict[str, Any] = {"host": socket.gethostname(), "cpu": cpu_seconds, **seconds}
    all_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(all_ranks, own)
    stages = [stage for stage in STAGES if any(stage in row for row in all_ranks)]
    lines = ["  ".join([f"{'rank':>5}", *(f"{name:>9}" for name in [*stages, "CPU"]), "host"])]
    for rank, row in enumerate(all_ranks):
        numbers = [row.get(stage, 0.0) for stage in stages] + [row["cpu"]]
        lines.append("  ".join([f"{rank:>5}", *(f"{n:>9.3f}" for n in numbers), row["host"]]))
    busiest = max(range(len(all_ranks)), key=lambda rank: all_ranks[rank]["cpu"])
    return "\n".join([*lines, f"most CPU seconds: rank {busiest}"])


class Boundary:
    """Check between two steps for requests from outside the run."""

    def __init__(self, signals: Signals, watch: Watch, say: Callable[[str], None]) -> None:
        self._signals, self._watch, self._say = signals, watch, say
        self._cpu_start = time.process_time()
        self.stopped = False
        """Whether this process stops after the step just taken."""

    def stopping(self) -> bool:
        """Return whether any rank was asked to stop; log the stage times if requested."""
        self.stopped, report = self._signals.agree()
        if report:
            self._say(stage_table(self._watch.seconds(), time.process_time() - self._cpu_start))
        self._watch.reset_seconds()
        self._cpu_start = time.process_time()
        return self.stopped
