"""Divide the reads of a tensor into windows of its file, and assign rows to selections.

Several selections of one tensor are read in one ascending pass through its file, so that each byte
is touched in one window only, even if several selections contain it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe.hf.header import TensorInfo

WINDOW_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True)
class Copy:
    """Rows to copy from a window to the destination of one selection."""

    selection: int
    """Index of the selection."""
    rows: slice | Tensor
    """Rows to copy, relative to the first row of the window."""
    into: slice | Tensor
    """Rows of the destination."""


@dataclass(frozen=True, slots=True)
class Window:
    """Consecutive rows of the file and the copies to make from them."""

    start: int
    stop: int
    copies: list[Copy]


class _Cursor:
    """Progress of one selection through the file, in ascending order."""

    def __init__(self, rows: slice | Tensor, *, most: int) -> None:
        self._most, self._done = most, 0
        if isinstance(rows, slice):
            self._first, self._length, self._rows_M = rows.start, rows.stop - rows.start, None
        else:
            # Ascending, so that each byte of the file is touched in one window only.
            self._order_M = rows.argsort(stable=True)
            self._rows_M, self._length = rows[self._order_M], len(rows)
            self._unsorted_M = rows

    @property
    def next(self) -> int | None:
        """First row that was not read yet, or None."""
        if self._done == self._length:
            return None
        return self._row(self._done)

    def up_to(self, stop: int, *, selection: int, start: int) -> tuple[int, Iterator[Copy]]:
        """Consume the rows below ``stop``.

        Return the end of the last of them (exclusive), and the copies to make, each with at most
        ``most`` rows.
        """
        begin = self._done
        if self._rows_M is None:
            self._done = min(self._length, max(begin, stop - self._first))
        else:
            self._done = int(torch.searchsorted(self._rows_M, stop))
        last = self._row(self._done - 1) + 1 if self._done > begin else start
        return last, self._copies(begin, self._done, selection, start)

    def _row(self, index: int) -> int:
        return self._first + index if self._rows_M is None else int(self._rows_M[index])

    def _copies(self, begin: int, end: int, selection: int, start: int) -> Iterator[Copy]:
        for low in range(begin, end, self._most):  # a row can be selected many times
            high = min(low + self._most, end)
            if self._rows_M is None:
                first = self._first + low - start
                yield Copy(selection, slice(first, first + high - low), slice(low, high))
            elif end - begin == self._length:  # all in one window: keep the destination's order
                yield Copy(selection, self._unsorted_M[low:high] - start, slice(low, high))
            else:
                yield Copy(selection, self._rows_M[low:high] - start, self._order_M[low:high])


def windows(info: TensorInfo, selections: Sequence[slice | Tensor]) -> Iterator[Window]:
    """Divide the selected rows into windows of at most ``WINDOW_BYTES`` of the file, ascending."""
    if not selections:
        return
    most = max(1, WINDOW_BYTES // (math.prod(info.shape[1:]) * info.dtype.itemsize))
    cursors = [_Cursor(rows, most=most) for rows in selections]
    while pending := [row for cursor in cursors if (row := cursor.next) is not None]:
        start = min(pending)
        stop, copies = start, list[Copy]()
        for selection, cursor in enumerate(cursors):
            end, more = cursor.up_to(start + most, selection=selection, start=start)
            stop = max(stop, end)
            copies += more
        yield Window(start, stop, copies)
