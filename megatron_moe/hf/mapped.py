"""Memory-map values of a file."""

from __future__ import annotations

import mmap
from pathlib import Path

import torch
from torch import Tensor


def map_values(path: Path, *, offset: int, count: int, dtype: torch.dtype) -> Tensor:
    """Map ``count`` values that start at byte ``offset``, as a one-dimensional tensor.

    They are read on access, and unmapped when the last view of them is deleted.

    Raises:
        OSError: The file cannot be opened.
        ValueError: The file is too short.
    """
    page = offset - offset % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        # A private copy that is never written: torch warns about read-only memory.
        mapped = mmap.mmap(
            file.fileno(),
            offset - page + count * dtype.itemsize,
            access=mmap.ACCESS_COPY,
            offset=page,
        )
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=offset - page)
