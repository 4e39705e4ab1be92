"""Which rows and columns of a tensor are asked for, as indices that it has."""

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
"""Consecutive indices (step 1), or a 1-D list of them in any order, repeats allowed."""


@dataclass(frozen=True, slots=True)
class Selected:
    """Rows and columns that exist, as slices with both ends or int64 lists, and their shape."""

    rows: slice | Tensor
    columns: slice | Tensor | None
    shape: tuple[int, ...]


def select(name: str, info: TensorInfo, rows: Indices | None, columns: Indices | None) -> Selected:
    """The selection with both its ends; None takes all of a dimension.

    Raises:
        CheckpointError: Indices that the tensor does not have, or dimensions that are not read.
    """
    if len(info.shape) not in (1, 2) or (columns is not None and len(info.shape) == 1):
        raise CheckpointError(
            f"{name} must have {'2' if columns is not None else '1 or 2'} dimensions to be read, "
            f"but is {info.shape}.\n  file: {info.file}"
        )
    asked = (("rows", rows), ("columns", columns))
    chosen = []
    for (kind, indices), size in zip(asked, info.shape, strict=False):
        chosen.append(_normal(indices, size))
        first, last = _extent(chosen[-1])
        if not 0 <= first <= last + 1 <= size:
            raise CheckpointError(
                f"{name} is {info.shape}, but {kind} {first} to {last} are asked for.\n"
                f"  file: {info.file}"
            )
    shape = tuple(i.stop - i.start if isinstance(i, slice) else len(i) for i in chosen)
    return Selected(chosen[0], chosen[1] if len(chosen) == 2 else None, shape)


def _normal(indices: Indices | None, size: int) -> slice | Tensor:
    if indices is None:
        return slice(0, size)
    if isinstance(indices, slice):
        assert indices.step in (None, 1), f"only consecutive indices make a slice: {indices}"
        return slice(indices.start or 0, size if indices.stop is None else indices.stop)
    listed = torch.as_tensor(indices).cpu()
    assert listed.ndim == 1, f"a list of indices is 1-D: {listed}"
    assert listed.dtype != torch.bool, f"a mask is not a list of indices: {listed}"
    return listed.long()


def _extent(indices: slice | Tensor) -> tuple[int, int]:
    """Smallest and largest index of a selection; of an empty one, the largest is one less."""
    if isinstance(indices, slice):
        return indices.start, indices.stop - 1
    return (int(indices.min()), int(indices.max())) if len(indices) else (0, -1)
