"""Write boxes to files and read them back, in Megatron-Core's torch_dist format.

This uses torch's distributed checkpoint. torch plans which rank writes what (boxes that several
ranks hold are written once, with balanced load), checks that the boxes cover every tensor, and
finds which stored boxes a rank needs. Reading fills the destination tensors in place.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_moe.checkpoint.boxes import Box
from megatron_moe.checkpoint.hashing import HashingWriter
from megatron_moe.checkpoint.host import on_host
from megatron_moe.checkpoint.index import SafeReader
from megatron_moe.errors import CheckpointError
from megatron_moe.hf.checksums import Blocks

Boxes = dict[str, list[Box]]
"""Boxes by name of the global tensor."""

_FILES_AT_ONCE = 2
"""Files that a rank writes at the same time: one is checksummed while the other is written."""


def write_boxes(boxes: Boxes, folder: Path, group: dist.ProcessGroup) -> Blocks:
    """Write the boxes of all ranks of ``group`` into an existing folder, and fsync the files.

    Returns:
        Checksums of what all ranks wrote, on rank 0; nothing on the others.

    Raises:
        CheckpointError: On every rank, if one could not write or a tensor is not fully covered.
    """
    writer = HashingWriter(folder, files_at_once=_FILES_AT_ONCE)
    try:
        dcp.save({}, storage_writer=writer, planner=_SavePlanner(boxes), process_group=group)
    except CheckpointException as error:
        raise CheckpointError(f"cannot write {folder}: {_reasons(error)}") from error
    return writer.blocks


def write_format(folder: Path) -> None:
    """Write the files by which Megatron-Core recognizes its own format."""
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    torch.save({}, folder / "common.pt")


def read_boxes(boxes: Boxes, folder: Path, group: dist.ProcessGroup) -> None:
    """Fill the boxes in place from a checkpoint of any layout.

    Raises:
        CheckpointError: A tensor is missing, has another shape, or a file is damaged.
    """
    reader = SafeReader(folder)
    reader.read_metadata()  # here, because torch logs an error of it with a traceback, or drops it
    try:
        dcp.load({}, storage_reader=reader, planner=_LoadPlanner(boxes), process_group=group)
    except CheckpointException as error:
        raise CheckpointError(f"cannot load {folder}: {_reasons(error)}") from error


def _reasons(error: CheckpointException) -> str:
    """Return the errors with their ranks; ranks with the same error are listed together."""
    ranks: dict[str, list[int]] = {}
    for rank, (reason, _) in sorted(error.failures.items()):
        kind = "" if isinstance(reason, CheckpointError) else f"{type(reason).__name__}: "
        ranks.setdefault(f"{kind}{reason}", []).append(rank)
    return "; ".join(
        f"rank {', '.join(map(str, numbers))}: {reason}" for reason, numbers in ranks.items()
    )


class _SavePlanner(DefaultSavePlanner):
    """Plan to write boxes; torch's own planner supports only regular grids of shards."""

    def __init__(self, boxes: Boxes) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._boxes = boxes
        self._tensors = {
            (key, box.offset): box.tensor for key, held in boxes.items() for box in held
        }

    def create_local_plan(self) -> SavePlan:
        items = [_write_item(key, box) for key, held in self._boxes.items() for box in held]
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """Return the tensor on the host; the writing threads call this, one tensor at a time."""
        assert index.offset is not None
        return on_host(self._tensors[index.fqn, tuple(index.offset)].detach())


def _write_item(key: str, box: Box) -> WriteItem:
    chunk = _chunk(box)
    properties = TensorProperties(dtype=box.tensor.dtype)
    return WriteItem(
        index=MetadataIndex(key, chunk.offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(chunk, properties, torch.Size(box.global_shape)),
    )


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.tensor.shape))


class _LoadPlanner(DefaultLoadPlanner):
    """Plan to fill boxes from stored boxes of any sharding."""

    def __init__(self, boxes: Boxes) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._boxes = boxes
        self._tensors = {
            (key, box.offset): box.tensor for key, held in boxes.items() for box in held
        }

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[ReadItem] = []
        for key, held in self._boxes.items():
            stored = self.metadata.state_dict_metadata.get(key)
            if not isinstance(stored, TensorStorageMetadata):
                raise CheckpointError(f"it does not contain tensor {key}")
            shape = held[0].global_shape
            if tuple(stored.size) != shape:
                raise CheckpointError(
                    f"{key} has shape {tuple(stored.size)} there, but {shape} in this job"
                )
            items += create_read_items_for_chunk_list(key, stored, [_chunk(box) for box in held])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self._tensors[index.fqn, tuple(index.offset)].detach()
