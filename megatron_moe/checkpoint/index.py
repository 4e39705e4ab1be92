"""Read the index of a checkpoint without executing anything it refers to.

This module does not import Megatron-Core: an export needs none of it, and its import is slow and
prints warnings.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
from collections.abc import Iterator
from io import IOBase
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata

from megatron_moe.errors import CheckpointError
from megatron_moe.hf.checksums import Checksums, read_checksums
from megatron_moe.regular_file import regular


class SafeReader(FileSystemReader):
    """torch's reader, which checks checksums and unpickles only what torch itself writes.

    ``.metadata`` is a pickle, and a pickle can call anything that can be imported.
    """

    _index: Metadata | None = None
    checksums: Checksums | None = None
    """Checksums of the checkpoint, after `read_metadata`; None if it has none."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self.fs = _RegularFiles()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the index of the checkpoint, once.

        Raises:
            CheckpointError: The index is missing, damaged, or refers to a disallowed type.
        """
        if self._index is not None:
            return self._index
        path = Path(self.path) / ".metadata"
        self.checksums = read_checksums(path.parent)
        try:
            pickled = regular(path).read_bytes()
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
        if self.checksums is not None:
            self.checksums.check(path.name, pickled)
        try:
            metadata = _Unpickler(io.BytesIO(pickled)).load()
        except Exception as error:  # a damaged pickle can raise almost any exception
            raise CheckpointError(f"cannot read {path}: {error}") from error
        try:
            names = [str(stored.relative_path) for stored in metadata.storage_data.values()]
        except AttributeError as error:
            raise CheckpointError(f"{path} is not the index of a checkpoint") from error
        for name in names:
            if Path(name).name != name or name == "..":
                raise CheckpointError(f"{path} points outside its folder: {name}")
        self._index = metadata
        return metadata

    def check(self, file: IO[bytes], stored: _StorageInfo) -> None:
        """Compare a stored chunk of a tensor with its checksum, if there is one.

        Raises:
            CheckpointError: It differs from what was written.
        """
        if self.checksums is not None:
            self.checksums.check_block(stored.relative_path, file, offset=stored.offset)

    def _slice_file(self, file: IO[bytes], sinfo: _StorageInfo) -> IO[bytes]:
        self.check(file, sinfo)
        return super()._slice_file(file, sinfo)


class _RegularFiles(FileSystem):
    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[IOBase]:
        with super().create_stream(regular(Path(path)), mode) as stream:
            yield stream


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _METADATA_NAMES:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in an index")
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
        *(  # Megatron-Core also stores which rank wrote what
            ("torch.distributed.checkpoint.planner", name)
            for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")
        ),
        *(("torch", str(dtype).removeprefix("torch.")) for dtype in
          (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8)),
    }
)  # fmt: skip
