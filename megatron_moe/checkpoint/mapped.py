"""Memory-map a saved tensor inside a file of a distributed checkpoint, and read rows on access.

``torch.save`` wrote the tensor as a separate archive at some offset of the file. torch loads it
onto the meta device and reports the offset of its data; rows are then copied from the mapped file.
They may start at any byte, so they are copied as bytes and then viewed in their dtype.

Shape letters: R selected rows, W bytes of a row.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_moe.hf.mapped import map_values


@dataclass(frozen=True, slots=True)
class MappedTensor:
    """A tensor whose rows, the slices of its first axis, are read on access."""

    file_bytes: Tensor
    """Mapped bytes of the tensor, uint8, one-dimensional."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    def at(self, index: int) -> MappedTensor:
        """Return slice ``index`` of the first axis, with that axis dropped; nothing is read."""
        byte_range = slice(index * self._row_bytes, (index + 1) * self._row_bytes)
        return MappedTensor(self.file_bytes[byte_range], self.shape[1:], self.dtype)

    def rows(self, rows_R: Tensor) -> Tensor:
        """Return these rows as a new tensor."""
        bytes_RW = self.file_bytes.view(-1, self._row_bytes).index_select(0, rows_R)
        return bytes_RW.flatten().view(self.dtype).view(len(rows_R), *self.shape[1:])

    @property
    def _row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize


def map_tensor(path: Path, *, offset: int, length: int) -> MappedTensor:
    """Map the tensor that ``torch.save`` wrote at ``offset``.

    A tensor that is not contiguous is read as a whole, because its rows are scattered in the file.
    """
    with path.open("rb") as file:
        section = _section(file, offset, length)
        stored: Tensor = torch.load(section, map_location="meta", weights_only=True)
    shape, dtype = tuple(stored.shape), stored.dtype
    if not stored.is_contiguous():
        with path.open("rb") as file:
            whole: Tensor = torch.load(_section(file, offset, length), weights_only=True)
        return MappedTensor(whole.contiguous().view(-1).view(torch.uint8), shape, dtype)
    storage: Any = stored.untyped_storage()
    start = offset + storage._checkpoint_offset + int(stored.storage_offset()) * dtype.itemsize
    num_bytes = math.prod(shape) * dtype.itemsize
    mapped = map_values(path, offset=start, count=num_bytes, dtype=torch.uint8)
    return MappedTensor(mapped, shape, dtype)


def _section(file: BinaryIO, offset: int, length: int) -> io.BufferedReader:
    return io.BufferedReader(_Section(file, offset, length))


class _Section(io.RawIOBase):
    """A byte range of a file, as a file object."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length = file, offset, length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, into: memoryview) -> int:  # type: ignore[override]
        count = max(0, min(len(into), self._length - self._position))
        self._file.seek(self._offset + self._position)
        data = self._file.read(count)
        into[: len(data)] = data
        self._position += len(data)
        return len(data)
