"""One saved tensor inside a file of a distributed checkpoint, mapped: what is taken is read.

``torch.save`` wrote it as an archive of its own at some place of the file. torch loads it without
its numbers and says where they would be; rows are then copied out of the mapped file. They start at
any byte, so they are moved as bytes and become numbers in memory of their own.

Shape letters: R rows that are taken, W bytes of a row.
"""

from __future__ import annotations

import io
import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class MappedTensor:
    """A tensor whose rows, slices of its first axis, are read when they are taken."""

    file_bytes: Tensor
    """Of the file, uint8, flat."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    def at(self, index: int) -> MappedTensor:
        """Slice ``index`` of the first axis, that axis dropped; nothing is read."""
        here = slice(index * self._row_bytes, (index + 1) * self._row_bytes)
        return MappedTensor(self.file_bytes[here], self.shape[1:], self.dtype)

    def rows(self, rows_R: Tensor) -> Tensor:
        """A new tensor of these rows."""
        taken_RW = self.file_bytes.view(-1, self._row_bytes).index_select(0, rows_R)
        return taken_RW.flatten().view(self.dtype).view(len(rows_R), *self.shape[1:])

    @property
    def _row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize


def map_tensor(path: Path, *, offset: int, length: int) -> MappedTensor:
    """The tensor that ``torch.save`` wrote at ``offset``.

    A tensor that does not lie row by row is read whole: its rows are nowhere in the file.
    """
    with path.open("rb") as file:
        part = _part(file, offset, length)
        stored: Tensor = torch.load(part, map_location="meta", weights_only=True)
    shape, dtype = tuple(stored.shape), stored.dtype
    if not stored.is_contiguous():
        with path.open("rb") as file:
            whole: Tensor = torch.load(_part(file, offset, length), weights_only=True)
        return MappedTensor(whole.contiguous().view(-1).view(torch.uint8), shape, dtype)
    storage: Any = stored.untyped_storage()
    start = offset + storage._checkpoint_offset + int(stored.storage_offset()) * dtype.itemsize
    return MappedTensor(_bytes_of(path, start, math.prod(shape) * dtype.itemsize), shape, dtype)


def _bytes_of(path: Path, start: int, num_bytes: int) -> Tensor:
    """Bytes of a file as a view of it, unmapped when the last view goes."""
    page = start - start % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        # A private copy, never written to: torch warns about memory that is read-only.
        mapped = mmap.mmap(
            file.fileno(), start - page + num_bytes, access=mmap.ACCESS_COPY, offset=page
        )
    return torch.frombuffer(mapped, dtype=torch.uint8, count=num_bytes, offset=start - page)


def _part(file: BinaryIO, offset: int, length: int) -> io.BufferedReader:
    return io.BufferedReader(_Part(file, offset, length))


class _Part(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length = file, offset, length
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._length}[whence]
        self._place = start + offset
        return self._place

    def readinto(self, into: memoryview) -> int:  # type: ignore[override]
        count = max(0, min(len(into), self._length - self._place))
        self._file.seek(self._offset + self._place)
        found = self._file.read(count)
        into[: len(found)] = found
        self._place += len(found)
        return len(found)
