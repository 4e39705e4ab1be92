"""Boxes to files and back, with torch's distributed checkpoint (Megatron-Core's torch_dist format).

torch plans who writes what (boxes that several ranks hold are written once, the load spread over
them), checks that the boxes cover every tensor, and finds which stored boxes a rank needs. Reading
puts numbers straight into the memory they belong to.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
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
from megatron_moe.errors import CheckpointError

Boxes = dict[str, list[Box]]
"""By name of the global tensor."""


def write_boxes(boxes: Boxes, folder: Path, group: dist.ProcessGroup) -> None:
    """Write the boxes of all ranks of ``group`` into an existing folder; files are fsynced.

    Raises:
        CheckpointError: On every rank when one could not write, or tensors are not covered.
    """
    writer = FileSystemWriter(folder, sync_files=True)
    try:
        dcp.save({}, storage_writer=writer, planner=_SavePlanner(boxes), process_group=group)
    except CheckpointException as error:
        raise CheckpointError(f"cannot write {folder}: {_reasons(error)}") from error


def name_format(folder: Path) -> None:
    """Write what makes Megatron-Core recognise its own format."""
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    torch.save({}, folder / "common.pt")


def read_boxes(boxes: Boxes, folder: Path, group: dist.ProcessGroup) -> None:
    """Fill the boxes' memory from a checkpoint of any layout.

    Raises:
        CheckpointError: A tensor is missing, has another shape, or a file is damaged.
    """
    try:
        dcp.load(
            {}, storage_reader=SafeReader(folder), planner=_LoadPlanner(boxes), process_group=group
        )
    except CheckpointException as error:
        raise CheckpointError(f"cannot load {folder}: {_reasons(error)}") from error


def _reasons(error: CheckpointException) -> str:
    """What went wrong, by rank; ranks with the same trouble in one line."""
    ranks: dict[str, list[int]] = {}
    for rank, (reason, _) in sorted(error.failures.items()):
        ranks.setdefault(f"{type(reason).__name__}: {reason}", []).append(rank)
    return "; ".join(
        f"rank {', '.join(map(str, where))}: {reason}" for reason, where in ranks.items()
    )


class SafeReader(FileSystemReader):
    """torch's reader, with a ``.metadata`` that can name nothing but what torch writes there.

    ``.metadata`` is a pickle, and a pickle can call anything that can be imported.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index of the checkpoint.

        Raises:
            CheckpointError: Not there, damaged, or naming something that has no place in it.
        """
        path = Path(self.path) / ".metadata"
        try:
            metadata = _Unpickler(io.BytesIO(path.read_bytes())).load()
        except Exception as error:  # a damaged pickle raises nearly anything
            raise CheckpointError(f"cannot read {path}: {error}") from error
        if not isinstance(metadata, Metadata) or metadata.storage_data is None:
            raise CheckpointError(f"{path} is not the index of a checkpoint")
        for stored in metadata.storage_data.values():
            if (
                Path(stored.relative_path).name != stored.relative_path
                or stored.relative_path == ".."
            ):
                raise CheckpointError(f"{path} points out of its folder: {stored.relative_path}")
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _METADATA_NAMES:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in an index")
        return super().find_class(module, name)


_METADATA_NAMES = frozenset(
    {
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        *(
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex",
                "StorageMeta", "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
            )
        ),
        *(  # Megatron-Core keeps who wrote what beside the index
            ("torch.distributed.checkpoint.planner", name)
            for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")
        ),
        *(("torch", str(dtype).removeprefix("torch.")) for dtype in
          (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8)),
    }
)  # fmt: skip


class _SavePlanner(DefaultSavePlanner):
    """Plans to write boxes; torch's own planner knows tensors of a regular grid only."""

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
        assert index.offset is not None
        return self._tensors[index.fqn, tuple(index.offset)].detach()


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
    """Plans to fill boxes, from stored boxes of any cut."""

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
                raise CheckpointError(f"it holds no tensor {key}")
            shape = held[0].global_shape
            if tuple(stored.size) != shape:
                raise CheckpointError(
                    f"{key} has shape {tuple(stored.size)} there, and {shape} in this job"
                )
            items += create_read_items_for_chunk_list(key, stored, [_chunk(box) for box in held])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self._tensors[index.fqn, tuple(index.offset)].detach()
