"""Progress bar with an ETA that appears only if the work takes longer than a few seconds."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

PATIENCE_SECONDS = 5.0


class ByteProgress:
    """Progress bar of bytes, drawn on stderr after `PATIENCE_SECONDS`.

    Example::

        with ByteProgress("tokenize corpus.jsonl", total_bytes=size) as progress:
            progress.advance_to(offset)
    """

    def __init__(self, title: str, *, total_bytes: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task(title, total=total_bytes)
        self._starts_at = time.monotonic() + PATIENCE_SECONDS
        self._drawn = False

    def advance_to(self, done_bytes: int) -> None:
        """Set the total number of bytes done."""
        self._progress.update(self._task, completed=done_bytes)
        if not self._drawn and time.monotonic() > self._starts_at:
            self._progress.start()
            self._drawn = True

    def __enter__(self) -> ByteProgress:
        """Return the progress bar, not yet drawn."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop drawing the bar."""
        if self._drawn:
            self._progress.stop()
