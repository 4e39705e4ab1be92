"""View tensors of the same shape in one storage as one tensor, without a copy.

Shape letters: E tensors.

A layer's experts are separate parameters, because checkpoints, upcycling and the optimizer identify
them by name, but a grouped product needs all their weights in one tensor. Megatron-Core's data
parallelism lays parameters out in reverse order of ``module.parameters()``, so experts that are
registered last to first (`BackToFront`) are in memory first to last, at equal distances::

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
    """A ModuleList that registers modules last to first, with the usual indices and names."""

    def __init__(self, modules: Sequence[torch.nn.Module]) -> None:
        super().__init__(modules)
        self._modules = dict(reversed(self._modules.items()))

    def __iter__(self) -> Iterator[torch.nn.Module]:
        return (self[index] for index in range(len(self)))


def stacked(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return a view of all tensors, ``(E, *shape)``, or None if their memory does not allow it.

    Args:
        tensors: Contiguous tensors of one shape and dtype. They must be in one storage at equal
            ascending distances, each aligned to `ALIGNMENT_BYTES`.
    """
    first = tensors[0]
    itemsize, storage = first.element_size(), first.untyped_storage()
    starts = [tensor.data_ptr() for tensor in tensors]
    size = first.numel() * itemsize
    step = starts[1] - starts[0] if len(starts) > 1 else _round_up(size, ALIGNMENT_BYTES)
    if starts != [starts[0] + index * step for index in range(len(starts))] or step < size:
        return None
    # Memory inside this storage belongs to no other storage, so checking its end is enough.
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

    Call it when the parameters are on their final device, before data parallelism and the optimizer
    use them. It holds a second copy of these parameters while it runs.
    """
    whole = torch.stack([parameter.data for parameter in parameters])
    for parameter, row in zip(parameters, whole.unbind(), strict=True):
        parameter.data = row
