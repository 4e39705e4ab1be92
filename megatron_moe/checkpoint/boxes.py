"""Describe this rank's part of the global tensors as boxes, under any layout.

Every tensor of a checkpoint is one global tensor of the whole model, and every rank holds boxes of
it. A weight is one box, given by Megatron-Core's sharded state. The distributed optimizer splits a
weight at any element, not only between rows. A run of consecutive elements consists of at most part
of a row, whole rows, and part of a row, and each of these is a box. So optimizer state is saved and
restored under any layout without a gather.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_moe.errors import CheckpointError
from megatron_moe.model.build import Model


@dataclass(frozen=True, slots=True)
class Box:
    """A box of a global tensor and the memory that holds its elements."""

    offset: tuple[int, ...]
    tensor: Tensor
    """Elements of the box: a view of the job's own memory, or a copy of it."""
    global_shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Placement:
    """A run of consecutive elements of a local parameter that is one box of a global tensor."""

    parameter: Tensor
    start: int
    """Index of the run's first element in the flattened parameter."""
    shape: tuple[int, ...]
    key: str
    global_shape: tuple[int, ...]
    global_offset: tuple[int, ...]
    writes: bool
    """False if another tp or pp rank writes the same elements."""

    def boxes(self, flat: Tensor, *, begin: int) -> Iterator[Box]:
        """Yield the boxes of ``flat``, which holds the parameter's elements from ``begin`` on."""
        first = max(begin, self.start)
        last = min(begin + len(flat), self.start + math.prod(self.shape))
        extra = len(self.global_shape) - len(self.shape)  # such as the axis of experts
        for offset, sizes in boxes_of_run(self.shape, first - self.start, last - self.start):
            count = math.prod(sizes)
            local_offset = (0,) * extra + offset
            yield Box(
                offset=tuple(a + b for a, b in zip(self.global_offset, local_offset, strict=True)),
                tensor=flat[first - begin : first - begin + count].view((1,) * extra + sizes),
                global_shape=self.global_shape,
            )
            first += count


def boxes_of_run(
    shape: Sequence[int], start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield offset and size of each box of a run of elements of a row-major array, in order.

    >>> list(boxes_of_run((4, 3), 2, 10))
    [((0, 2), (1, 1)), ((1, 0), (2, 3)), ((3, 0), (1, 1))]
    """
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    while start < stop:
        index, within = divmod(start, row)
        rows = (stop - start) // row
        if within or not rows:
            end = min(stop, (index + 1) * row)
            for offset, sizes in boxes_of_run(shape[1:], within, end - index * row):
                yield (index, *offset), (1, *sizes)
        else:
            end = start + rows * row
            yield (index, *(0 for _ in shape[1:])), (rows, *shape[1:])
        start = end


def placements(model: Model, groups: ProcessGroupCollection) -> Iterator[Placement]:
    """Yield the placements of all parameters and buffers of this rank, under Megatron-Core's names.

    The rows that pad the vocabulary for tp are excluded, so a checkpoint does not depend on tp.
    """
    for module in model.modules:
        state = module.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp})
        for entry in state.values():
            if isinstance(entry, ShardedTensorFactory):
                parts: Any = nested_values(entry.build())
                yield from (_placement(entry.data, part, model) for part in parts)
            elif isinstance(entry, ShardedTensor):
                assert entry.data is not None
                yield _placement(entry.data, entry, model)


def _placement(parameter: Tensor, part: ShardedTensor, model: Model) -> Placement:
    data = part.data
    shares_storage = data is not None and data.untyped_storage().data_ptr() == (
        parameter.untyped_storage().data_ptr()
    )
    if data is None or not (shares_storage and data.is_contiguous() and parameter.is_contiguous()):
        raise CheckpointError(f"{part.key} must be a run of consecutive elements of its parameter")
    replica = part.replica_id if isinstance(part.replica_id, tuple) else (part.replica_id,)
    placement = Placement(
        parameter=parameter,
        start=int(data.storage_offset() - parameter.storage_offset()),
        shape=tuple(part.local_shape),
        key=part.key,
        global_shape=tuple(part.global_shape),
        global_offset=tuple(part.global_offset),
        writes=not any(replica[:2]),  # the third is the dp rank
    )
    if not part.allow_shape_mismatch:
        return placement
    rows = model.spec.vocab_size
    return replace(
        placement,
        shape=(
            max(0, min(placement.shape[0], rows - placement.global_offset[0])),
            *placement.shape[1:],
        ),
        global_shape=(rows, *placement.global_shape[1:]),
    )
