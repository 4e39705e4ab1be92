"""What an operator sees: lines of rank 0, and how far training has come."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(highlight=False, soft_wrap=True)


class StepProgress:
    """On rank 0 a bar with loss, speed and ETA, or without a terminal one line a step."""

    def __init__(self, *, total: int, done: int, rank: int) -> None:
        self._total, self._first, self._start = total, done, time.monotonic()
        self._quiet = rank != 0
        self._bar = None
        if console.is_terminal and not self._quiet:
            self._bar = Progress(
                TextColumn("training"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[numbers]}"), TimeElapsedColumn(), TextColumn("ETA"),
                TimeRemainingColumn(), console=console,
            )  # fmt: skip
            self._task = self._bar.add_task("", total=total, completed=done, numbers="")

    def __enter__(self) -> StepProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, numbers: Mapping[str, Any]) -> None:
        """Tell of the step that was just taken."""
        if self._quiet:
            return
        step = numbers["step"]
        text = (
            f"loss {numbers['loss/lm']:.4f}  "
            f"{numbers['throughput/tokens_per_second_per_gpu']:.1f} tok/s/rank  "
            f"MFU {numbers['throughput/mfu']:.1%}  grad norm {numbers['grad_norm']:.2f}"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=text)
            return
        left = (time.monotonic() - self._start) / (step - self._first) * (self._total - step)
        console.print(f"step {step}/{self._total}  {text}  ETA {_clock(left)}")


class RoundProgress:
    """On rank 0 a bar with ETA, or without a terminal a line every tenth of the way."""

    def __init__(self, what: str, *, rank: int) -> None:
        self._what, self._quiet = what, rank != 0
        self._start, self._first = time.monotonic(), None
        self._bar = None
        if console.is_terminal and not self._quiet:
            self._bar = Progress(
                TextColumn(what), BarColumn(), TextColumn("{task.completed}/{task.total}"),
                TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(), console=console,
            )  # fmt: skip
            self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> RoundProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, done: int, total: int) -> None:
        """Tell how far it is."""
        if self._first is None:
            self._first = done - 1
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)
        elif not self._quiet and (done == total or done % max(1, total // 10) == 0):
            left = (time.monotonic() - self._start) / (done - self._first) * (total - done)
            console.print(f"{self._what} {done}/{total}  ETA {_clock(left)}")

    def say(self, text: str) -> None:
        """A line of its own, once."""
        if not self._quiet:
            console.print(text)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
