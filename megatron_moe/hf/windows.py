"""Windows of a safetensors file: mapped one at a time, and who takes which rows of each.

Several selections of one tensor pass through its file together, ascending, so that each byte is
touched in one window only, whoever wants it and how often.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe.errors import CheckpointError
from megatron_moe.hf.header import TensorInfo

WINDOW_BYTES = 32 * 2**20
_READ_BYTES = 2**20
"""At once, so that what was read is still in the cache when it is looked at."""


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


def values_of(
    name: str,
    info: TensorInfo,
    window: Window,
    mapped: Tensor,
    part: Part,
    columns: slice | Tensor | None,
) -> Tensor:
    """The wanted rows and columns of a window: a view of the mapped file where possible."""
    take = part.take
    values = mapped[take] if isinstance(take, slice) else mapped.index_select(0, take)
    if isinstance(columns, slice):
        values = values[:, columns]
    elif columns is not None:
        # A third of index_select's time along rows of bf16, and gives the same.
        values = values.gather(1, columns.expand(len(values), -1))
    _check_finite(name, info, values, f"rows {window.start} to {window.stop - 1}")
    return values


def read_rows(name: str, info: TensorInfo, rows: slice | Tensor, into: Tensor) -> None:
    """Consecutive rows straight into memory of the same dtype, and a look at every value."""
    assert isinstance(rows, slice), rows
    row_values = math.prod(info.shape[1:])
    step = max(1, _READ_BYTES // info.dtype.itemsize)  # values
    values = into.view(-1)
    offset = info.offset + rows.start * row_values * info.dtype.itemsize
    try:
        with info.file.open("rb") as file:  # buffered: a signal does not cut a read short
            file.seek(offset)
            for start in range(0, len(values), step):
                part = values[start : start + step]
                if file.readinto(memoryview(part.view(torch.uint8).numpy())) != part.nbytes:
                    raise OSError("it has become shorter")
                first, last = start // row_values, (start + len(part) - 1) // row_values
                _check_finite(name, info, part, f"rows {rows.start + first} to {rows.start + last}")
    except OSError as error:
        raise CheckpointError(f"cannot read {info.file} any more: {error}") from error


def _check_finite(name: str, info: TensorInfo, values: Tensor, where: str) -> None:
    # A sum costs a tenth of isfinite() and cannot hide a NaN or an infinity; it may overflow.
    if not values.sum().isfinite() and not (finite := values.isfinite()).all():
        raise CheckpointError(
            f"{name} must be finite, but holds {int((~finite).sum())} NaN or infinite values in "
            f"{where}.\n  file: {info.file}"
        )


def mapped_rows(info: TensorInfo, window: Window) -> Tensor:
    """The rows of a window as a view of the file, unmapped when the last view of it goes."""
    row_bytes = math.prod(info.shape[1:]) * info.dtype.itemsize
    start = info.offset + window.start * row_bytes
    page = start - start % mmap.ALLOCATIONGRANULARITY
    num_bytes = (window.stop - window.start) * row_bytes
    try:
        with info.file.open("rb") as file:
            # A private copy, never written to: torch warns about memory that is read-only.
            mapped = mmap.mmap(
                file.fileno(), start - page + num_bytes, access=mmap.ACCESS_COPY, offset=page
            )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {info.file} any more: {error}") from error
    shape = (window.stop - window.start, *info.shape[1:])
    count = num_bytes // info.dtype.itemsize
    return torch.frombuffer(mapped, dtype=info.dtype, count=count, offset=start - page).view(shape)
