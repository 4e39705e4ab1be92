"""Output for the operator: log lines and progress bars of rank 0."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class _Console(Console):
    """Console that outlives the reader of its output: ``train ... | head`` keeps training."""

    def on_broken_pipe(self) -> None:
        """Send further output nowhere, and say so on standard error."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        with contextlib.suppress(OSError):
            print(
                "Standard output was closed: the run continues, and its numbers are in "
                "run.dir/metrics.jsonl",
                file=sys.stderr,
                flush=True,
            )


console = _Console(highlight=False, soft_wrap=True)


def quiet_megatron(rank: int) -> None:
    """Silence Megatron-Core's warnings on all ranks but 0: they are the same everywhere."""
    if rank:
        warnings.filterwarnings("ignore", module=r"megatron\.core")
        logging.getLogger("megatron.core").setLevel(logging.ERROR)


LINE_SECONDS = 2.0
"""Least time between lines of progress, so that a job of a second prints one."""


class _Progress:
    """Progress bar on rank 0 of a terminal. Without a terminal, subclasses print lines."""

    def __init__(self, title: str, *fields: str, rank: int, total: int | None, done: int) -> None:
        self._quiet = rank != 0
        self._first, self._start = done, time.monotonic()
        self._tenth, self._printed = 0, self._start
        self._bar = None
        if console.is_terminal and not self._quiet:
            columns = ("{task.completed}/{task.total}", *(f"{{task.fields[{f}]}}" for f in fields))
            self._bar = Progress(
                TextColumn(title), BarColumn(), *map(TextColumn, columns), TimeElapsedColumn(),
                TextColumn("ETA"), TimeRemainingColumn(), console=console,
            )  # fmt: skip
            empty: dict[str, Any] = dict.fromkeys(fields, "")
            self._task = self._bar.add_task("", total=total, completed=done, **empty)

    def __enter__(self) -> Self:
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

    def _line_is_due(self, done: int, total: int) -> bool:
        """Return whether to print a line: at a new tenth of a job of seconds, and at the end."""
        tenth, now = done * 10 // max(1, total), time.monotonic()
        if done < total and (tenth <= self._tenth or now - self._printed < LINE_SECONDS):
            return False
        self._tenth, self._printed = tenth, now
        return True

    def _left(self, done: int, total: int) -> str:
        """Return the remaining time at the pace so far."""
        pace = (time.monotonic() - self._start) / (done - self._first)
        return _clock(pace * (total - done))


class StepProgress(_Progress):
    """Show loss, speed and ETA on rank 0: a bar, or one line per step without a terminal."""

    def __init__(self, *, total: int, done: int, rank: int) -> None:
        super().__init__("training", "numbers", rank=rank, total=total, done=done)
        self._total = total

    def show(self, numbers: Mapping[str, Any]) -> None:
        """Show the step that was just taken."""
        if self._quiet:
            return
        step = numbers["step"]
        text = (
            f"loss {numbers['loss/lm']:.4f}  "
            f"{numbers['throughput/tokens_per_second_per_gpu']:.1f} tok/s/rank  "
            f"MFU {numbers['throughput/mfu']:.1%} "
            f"({numbers['throughput/mfu_full_attention']:.1%} with full attention)  "
            f"grad norm {numbers['grad_norm']:.2f}"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=text)
            return
        left = self._left(step, self._total)
        console.print(f"step {step}/{self._total}  {text}  ETA {left}")


class RoundProgress(_Progress):
    """Show rounds and ETA on rank 0: a bar, or a line per 10% without a terminal."""

    def __init__(self, what: str, *, rank: int) -> None:
        super().__init__(what, rank=rank, total=None, done=0)
        self._what, self._begun = what, False

    def show(self, done: int, total: int) -> None:
        """Show the progress. A first call with more than 1 means that a run was resumed."""
        if not self._begun:
            self._begun, self._first = True, done - 1
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)
        elif not self._quiet and self._line_is_due(done, total):
            console.print(f"{self._what} {done}/{total}  ETA {self._left(done, total)}")

    def say(self, text: str) -> None:
        """Print a line on rank 0."""
        if not self._quiet:
            console.print(text)


class BytesProgress(_Progress):
    """Show bytes and ETA on rank 0: a bar, or a line per 10% without a terminal."""

    def __init__(self, what: str, *, rank: int) -> None:
        super().__init__(what, "size", rank=rank, total=None, done=0)
        self._what = what

    def show(self, done: int, total: int) -> None:
        """Show the progress."""
        size = f"{done / 2**30:.2f}/{total / 2**30:.2f} GiB"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, size=size)
        elif not self._quiet and self._line_is_due(done, total):
            console.print(f"{self._what} {size}  ETA {self._left(done, total)}")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
