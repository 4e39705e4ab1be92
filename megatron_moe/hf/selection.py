"""Normalize and check selections of rows and columns of a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_moe.errors import CheckpointError
from megatron_moe.hf.header import TensorInfo

Indices = slice | NDArray[np.integer[Any]] | Tensor
"""Consecutive indices (a slice with step 1), or a 1-D list in any order, with repeats allowed."""


@dataclass(frozen=True, slots=True)
class Selected:
    """A checked selection: slices with both ends or int64 lists, and the resulting shape."""

    rows: slice | Tensor
    columns: slice | Tensor | None
    shape: tuple[int, ...]


def select(name: str, info: TensorInfo, rows: Indices | None, columns: Indices | None) -> Selected:
    """Return a checked selection; None selects all of a dimension.

    Raises:
        CheckpointError: An index is out of range, or the number of dimensions is not supported.
    """
    if len(info.shape) not in (1, 2) or (columns is not None and len(info.shape) == 1):
        raise CheckpointError(
            f"{name} must have {'2' if columns is not None else '1 or 2'} dimensions to be read, "
            f"but is {info.shape}.\n  file: {info.file}"
        )
    requested = (("rows", rows), ("columns", columns))
    selected = []
    for (kind, indices), size in zip(requested, info.shape, strict=False):
        selected.append(_normalized(indices, size))
        first, last = _extent(selected[-1])
        if not 0 <= first <= last + 1 <= size:
            raise CheckpointError(
                f"{name} is {info.shape}, but {kind} {first} to {last} were requested.\n"
                f"  file: {info.file}"
            )
    shape = tuple(i.stop - i.start if isinstance(i, slice) else len(i) for i in selected)
    return Selected(selected[0], selected[1] if len(selected) == 2 else None, shape)


def _normalized(indices: Indices | None, size: int) -> slice | Tensor:
    if indices is None:
        return slice(0, size)
    if isinstance(indices, slice):
        assert indices.step in (None, 1), f"slice step must be 1: {indices}"
        return slice(indices.start or 0, size if indices.stop is None else indices.stop)
    listed = torch.as_tensor(indices).cpu()
    assert listed.ndim == 1, f"indices must be 1-D: {listed}"
    assert listed.dtype != torch.bool, f"indices must not be a boolean mask: {listed}"
    return listed.long()


def _extent(indices: slice | Tensor) -> tuple[int, int]:
    """Return the smallest and largest index; if empty, the largest is the smallest minus one."""
    if isinstance(indices, slice):
        return indices.start, indices.stop - 1
    return (int(indices.min()), int(indices.max())) if len(indices) else (0, -1)
