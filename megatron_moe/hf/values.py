"""Numbers of a safetensors file: into memory, whole rows or some of them, each looked at once."""

from __future__ import annotations

import math
import mmap
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_moe.errors import CheckpointError
from megatron_moe.hf.header import TensorInfo
from megatron_moe.hf.windows import Window

_READ_BYTES = 2**20
"""At once, so that what was read is still in the cache when it is looked at."""
_BITS = {2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32), 8: (torch.int64, np.uint64)}
"""Integers of a number's width: numpy, which has no bf16, moves and compares them."""
_EXPONENT = {
    torch.float64: 0x7FF0_0000_0000_0000,
    torch.float32: 0x7F80_0000,
    torch.float16: 0x7C00,
    torch.bfloat16: 0x7F80,
}
"""Bits of infinity: those of each NaN lie above, those of every other number below."""


def read_rows(name: str, info: TensorInfo, rows: slice | Tensor, into: Tensor) -> None:
    """Consecutive rows straight into memory of the same dtype, and a look at every value.

    Raises:
        CheckpointError: The file cannot be read any more, or holds NaN or infinity there.
    """
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
                check_finite(name, info, part, f"rows {rows.start + first} to {rows.start + last}")
    except OSError as error:
        raise CheckpointError(f"cannot read {info.file} any more: {error}") from error


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


def taken(
    values: Tensor, rows: slice | Tensor, columns: slice | Tensor | None, out: Tensor | None
) -> Tensor:
    """Rows and columns of a mapped window.

    Args:
        values: The window.
        rows: Which of it, in any order.
        columns: The same of dimension 1; None takes all.
        out: Memory of the same dtype to put them into, on CPU.

    Returns:
        ``out``, or, without it, a view of the window where that is possible.
    """
    if isinstance(columns, slice) and columns == slice(0, values.shape[1]):
        columns = None
    if isinstance(rows, slice):
        values = values[rows]
    elif columns is None:
        return _take(values, rows, 0, out)
    else:
        values = _take(values, rows, 0)
    if isinstance(columns, Tensor):
        return _take(values, columns, 1, out)
    if columns is not None:
        values = values[:, columns]
    return values if out is None else out.copy_(values)


def _take(values: Tensor, indices: Tensor, dimension: int, out: Tensor | None = None) -> Tensor:
    """As gather and index_select of torch, which take 1.4 to 2.2 times as long with bf16."""
    into = None if out is None else _bits(out)
    # Every index exists; "raise" would look again, and buffer what it takes.
    found = np.take(_bits(values), indices.numpy(), dimension, into, mode="clip")
    return torch.from_numpy(found).view(values.dtype) if out is None else out


def check_finite(name: str, info: TensorInfo, values: Tensor, where: str) -> None:
    """Refuse NaN and infinity: two looks for a largest integer, which cost less than a sum.

    Raises:
        CheckpointError: Says how many there are, and where.
    """
    bits, infinity = _bits(values), _EXPONENT[values.dtype]
    unsigned = bits.view(_BITS[values.itemsize][1])
    negative = infinity | 1 << 8 * values.itemsize - 1
    if bits.max(initial=0) >= infinity or unsigned.max(initial=0) >= negative:
        count = int((~values.isfinite()).sum())
        raise CheckpointError(
            f"{name} must be finite, but holds {count} NaN or infinite values in "
            f"{where}.\n  file: {info.file}"
        )


def _bits(values: Tensor) -> NDArray[Any]:
    return values.view(_BITS[values.itemsize][0]).numpy()
