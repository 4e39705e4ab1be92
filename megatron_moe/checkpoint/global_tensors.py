"""Read whole tensors or single experts from a sharded checkpoint, without a distributed job.

Megatron-Core's ``torch_dist`` format is torch's distributed checkpoint: ``.metadata`` maps every
chunk of every global tensor to its position in a file. Only the chunks that overlap the requested
part are read.
"""

from __future__ import annotations

import io
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_moe.checkpoint.folder import with_way_out
from megatron_moe.checkpoint.index import SafeReader
from megatron_moe.checkpoint.mapped import MappedTensor, map_tensor
from megatron_moe.errors import CheckpointError
from megatron_moe.regular_file import regular


class GlobalTensors:
    """Open a checkpoint folder for reading; the end of a ``with`` block closes its files.

    Raises:
        CheckpointError: The folder has no readable ``.metadata``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, BinaryIO] = {}
        self._reader = SafeReader(folder)
        try:
            self._metadata = self._reader.read_metadata()
        except CheckpointError as error:
            raise with_way_out(error, folder) from error

    def __enter__(self) -> Self:
        return self

    @property
    def names(self) -> list[str]:
        """Names of all global tensors, sorted."""
        return sorted(self._metadata.state_dict_metadata)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __contains__(self, key: str) -> bool:
        return isinstance(self._metadata.state_dict_metadata.get(key), TensorStorageMetadata)

    def shape_and_dtype(self, key: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Return the shape and dtype of the whole tensor."""
        stored = self._stored(key)
        return tuple(stored.size), stored.properties.dtype

    def chunks(self, key: str, *, index: int | None) -> list[ChunkStorageMetadata]:
        """Return the chunks of a tensor, or those overlapping slice ``index`` of its first axis."""
        return [
            chunk
            for chunk in self._stored(key).chunks
            if index is None or chunk.offsets[0] <= index < chunk.offsets[0] + chunk.sizes[0]
        ]

    def read(self, key: str, *, index: int | None, dtype: torch.dtype) -> Tensor:
        """Read one global tensor, or only slice ``index`` of its first axis, dropping that axis.

        Raises:
            CheckpointError: There is no such tensor, or its chunks do not cover it.
        """
        stored = self._stored(key)
        shape = tuple(stored.size) if index is None else tuple(stored.size[1:])
        result, filled = torch.empty(shape, dtype=dtype), 0
        for chunk in self.chunks(key, index=index):
            part, region = self.load(key, chunk), _region(chunk)
            if index is not None:
                part, region = part[index - chunk.offsets[0]], region[1:]
            target = result[region]
            target.copy_(part[tuple(slice(size) for size in target.shape)])
            filled += target.numel()
        if filled != result.numel():
            raise CheckpointError(
                f"{key} in {self.folder} has only {filled} of its {result.numel()} elements"
            )
        return result

    def _stored(self, key: str) -> TensorStorageMetadata:
        stored = self._metadata.state_dict_metadata.get(key)
        if not isinstance(stored, TensorStorageMetadata):
            raise CheckpointError(f"{self.folder} does not contain tensor {key}")
        return stored

    def load(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        """Read the elements of one chunk."""
        where = self._where(key, chunk)
        file = self._files.get(where.relative_path)
        if file is None:
            file = self._files[where.relative_path] = self._open(where.relative_path)
        try:
            self._reader.check(file, where)
            file.seek(where.offset)
            return torch.load(io.BytesIO(file.read(where.length)), weights_only=True)
        except CheckpointError as error:
            raise with_way_out(error, self.folder) from None
        except Exception as error:
            problem = f"{self.folder / where.relative_path} is damaged at {key}: {error}"
            raise with_way_out(CheckpointError(problem), self.folder) from error

    def mapped(self, key: str, chunk: ChunkStorageMetadata) -> MappedTensor:
        """Map one chunk into memory; its rows are read on access, and no checksum is checked."""
        where = self._where(key, chunk)
        path = self.folder / where.relative_path
        try:
            return map_tensor(path, offset=where.offset, length=where.length)
        except Exception as error:
            raise CheckpointError(f"{path} is damaged at {key}: {error}") from error

    def file_of(self, key: str, chunk: ChunkStorageMetadata) -> Path:
        """Return the file that holds a chunk."""
        return self.folder / self._where(key, chunk).relative_path

    def _where(self, key: str, chunk: ChunkStorageMetadata) -> _StorageInfo:
        stored: dict[MetadataIndex, _StorageInfo] = self._metadata.storage_data or {}
        where = stored.get(MetadataIndex(key, chunk.offsets))
        if where is None:
            index = self.folder / ".metadata"
            raise CheckpointError(f"{index} does not give the location of a part of {key}")
        return where

    def _open(self, relative_path: str) -> BinaryIO:
        try:
            return regular(self.folder / relative_path).open("rb")
        except OSError as error:
            raise CheckpointError(f"cannot read {self.folder / relative_path}: {error}") from error


def _region(chunk: ChunkStorageMetadata) -> tuple[slice, ...]:
    return tuple(
        slice(offset, offset + size)
        for offset, size in zip(chunk.offsets, chunk.sizes, strict=True)
    )
