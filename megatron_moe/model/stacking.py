"""Views of equal tensors of one storage as one tensor, without a copy.

Shape letters: E tensors.

A layer's experts are separate parameters, because checkpoints, upcycling and the optimizer know
them by name. A grouped product needs the weights of all of them in one tensor. Megatron-Core's data
parallelism lays parameters out in reverse order of ``module.parameters()``; experts that are
registered last to first (`BackToFront`) therefore lie first to last, at equal distances::

    buffer    fc2 of 0 | fc1 of 0 | fc2 of 1 | fc1 of 1 | ...
              <- one expert's size -> the stride of both views
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

ALIGNMENT_BYTES = 16
"""Grouped products load rows through the tensor memory accelerator, which needs this alignment."""


class BackToFront(torch.nn.ModuleList):
    """A list whose modules are registered last to first; indices, names and iteration stay."""

    def __init__(self, modules: Sequence[torch.nn.Module]) -> None:
        super().__init__(modules)
        self._modules = dict(reversed(self._modules.items()))

    def __iter__(self) -> Iterator[torch.nn.Module]:
        return (self[index] for index in range(len(self)))


def stacked(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return ``(E, *shape)``, a view of all tensors, or None if their memory allows none.

    Args:
        tensors: Contiguous and of one shape and dtype. They must lie in one storage at equal
            ascending distances, each start aligned to `ALIGNMENT_BYTES`.
    """
    first = tensors[0]
    itemsize, storage = first.element_size(), first.untyped_storage()
    starts = [tensor.data_ptr() for tensor in tensors]
    size = first.numel() * itemsize
    step = starts[1] - starts[0] if len(starts) > 1 else _round_up(size, ALIGNMENT_BYTES)
    if starts != [starts[0] + index * step for index in range(len(starts))] or step < size:
        return None
    # Memory inside this storage is no other storage's, so one look at its end is enough.
    if starts[-1] + size > storage.data_ptr() + storage.nbytes():
        return None
    if starts[0] % ALIGNMENT_BYTES or step % ALIGNMENT_BYTES or step % itemsize:
        return None
    shape, stride = (len(tensors), *first.shape), (step // itemsize, *first.stride())
    return first.detach().as_strided(shape, stride)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


@torch.no_grad()
def lay_out(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Move parameters of one shape and dtype into one new storage, so that they can be stacked.

    Call it on a device's final parameters, before data parallelism and the optimizer see them. It
    holds a second copy of these parameters while it runs.
    """
    whole = torch.stack([parameter.data for parameter in parameters])
    for parameter, row in zip(parameters, whole.unbind(), strict=True):
        parameter.data = row
