"""Windows of a safetensors file, and who takes which rows of each.

Several selections of one tensor pass through its file together, ascending, so that each byte is
touched in one window only, whoever wants it and how often.
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
class Part:
    """What one selection takes of a window."""

    of: int
    """Which selection."""
    take: slice | Tensor
    """Rows wanted, counted from the first of the window."""
    into: slice | Tensor
    """Rows of the destination."""


@dataclass(frozen=True, slots=True)
class Window:
    """Consecutive rows of the file and who wants which of them."""

    start: int
    stop: int
    parts: list[Part]


class _Cursor:
    """One selection on its way through the file, ascending."""

    def __init__(self, rows: slice | Tensor, *, most: int) -> None:
        self._most, self._done = most, 0
        if isinstance(rows, slice):
            self._first, self._length, self._rows_M = rows.start, rows.stop - rows.start, None
        else:
            # Ascending, so that each byte of the file is touched in one window only.
            self._order_M = rows.argsort(stable=True)
            self._rows_M, self._length = rows[self._order_M], len(rows)
            self._as_wanted_M = rows

    @property
    def next(self) -> int | None:
        """The first row that is still wanted."""
        if self._done == self._length:
            return None
        return self._row(self._done)

    def up_to(self, stop: int, *, of: int, start: int) -> tuple[int, Iterator[Part]]:
        """One past the last wanted row below ``stop``, and the parts below it, none too large."""
        begin = self._done
        if self._rows_M is None:
            self._done = min(self._length, max(begin, stop - self._first))
        else:
            self._done = int(torch.searchsorted(self._rows_M, stop))
        last = self._row(self._done - 1) + 1 if self._done > begin else start
        return last, self._parts(begin, self._done, of, start)

    def _row(self, index: int) -> int:
        return self._first + index if self._rows_M is None else int(self._rows_M[index])

    def _parts(self, begin: int, end: int, of: int, start: int) -> Iterator[Part]:
        for low in range(begin, end, self._most):  # a row may be wanted many times
            high = min(low + self._most, end)
            if self._rows_M is None:
                first = self._first + low - start
                yield Part(of, slice(first, first + high - low), slice(low, high))
            elif end - begin == self._length:  # all in one window: they come as they are to lie
                yield Part(of, self._as_wanted_M[low:high] - start, slice(low, high))
            else:
                yield Part(of, self._rows_M[low:high] - start, self._order_M[low:high])


def windows(info: TensorInfo, selections: Sequence[slice | Tensor]) -> Iterator[Window]:
    """Cut what is wanted into windows of at most ``WINDOW_BYTES`` of the file, ascending."""
    if not selections:
        return
    most = max(1, WINDOW_BYTES // (math.prod(info.shape[1:]) * info.dtype.itemsize))
    cursors = [_Cursor(rows, most=most) for rows in selections]
    while wanted := [row for cursor in cursors if (row := cursor.next) is not None]:
        start = min(wanted)
        stop, parts = start, list[Part]()
        for of, cursor in enumerate(cursors):
            end, found = cursor.up_to(start + most, of=of, start=start)
            stop = max(stop, end)
            parts += found
        yield Window(start, stop, parts)
