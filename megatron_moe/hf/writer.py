"""Write a Hugging Face folder tensor by tensor, without holding the model in memory.

Names, shapes and dtypes are announced first, so that every file has its header and its size before
the first tensor is written, and tensors can be written in any order::

    announce -> .NAME.partial-1a2b3c4d/   model-00001-of-00002.safetensors  [header|..........]
    write    ->                                                             [header|...**.....]
    leave    -> all written? fsync, index, rename to NAME

Checksums of the tensors are computed as they are written (`checksums`).

The folder appears under its name only when it is complete. A ``kill -9`` leaves a sibling folder
with ``.partial-`` in its name, which can be deleted.
"""

from __future__ import annotations

import json
import math
import secrets
import shutil
import struct
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from megatron_moe.errors import CheckpointError
from megatron_moe.hf.checksums import MARK, Block, checksum, write_checksums
from megatron_moe.hf.disk import fsync, make_folder, size_in_words
from megatron_moe.hf.dtypes import NAME_IN_SAFETENSORS
from megatron_moe.hf.header import INDEX_FILE, SINGLE_FILE

_FLUSH_BYTES = 64 * 2**20
"""Bytes between background flushes, which overlap with gathering the next tensors."""


@dataclass(frozen=True, slots=True)
class _Slot:
    """Location of an announced tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str
    offset: int
    """Bytes from the start of the file."""

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype}"


class FolderWriter:
    """Write a folder: ``with FolderWriter(folder, tensors) as writer: writer.write(...)``.

    Args:
        folder: Final path of the folder when it is complete; its parents are created.
        tensors: Shape and dtype of every tensor. Files are filled in this order.
        max_shard_bytes: Maximum size of a file's tensors, unless a single tensor is larger.

    Raises:
        CheckpointError: On entering: the folder exists and is not empty, or the disk is too small.
            On leaving: a tensor was not written.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        *,
        max_shard_bytes: int = 5 * 10**9,
    ) -> None:
        self.folder = Path(folder).resolve()
        self._partial = self.folder.parent / f".{self.folder.name}.partial-{secrets.token_hex(4)}"
        self._headers, self._slots = _lay_out(tensors, max_shard_bytes)
        self._awaited = set(tensors)
        self._blocks = {
            file: {0: Block(0, len(header), checksum(header))}
            for file, header in self._headers.items()
        }
        self._flusher = ThreadPoolExecutor(max_workers=1)
        self._flushes: list[Future[None]] = []
        self._unflushed_bytes = 0

    def __enter__(self) -> Self:
        if self.folder.exists() and not (self.folder.is_dir() and not any(self.folder.iterdir())):
            raise CheckpointError(
                f"{self.folder} exists and is not an empty folder: it is not overwritten.\n"
                "  choose another name, or remove it first"
            )
        make_folder(self.folder.parent, "the folder of the export")
        needed, free = sum(self._file_bytes().values()), shutil.disk_usage(self.folder.parent).free
        if needed > free:
            raise CheckpointError(
                f"no space left on the disk of {self.folder}: {size_in_words(needed)} needed, "
                f"{size_in_words(free)} free.\n  free space, or choose another --out"
            )
        self._partial.mkdir()
        try:
            self._allocate()
        except BaseException:
            shutil.rmtree(self._partial)
            raise
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one announced tensor, from any device.

        Raises:
            CheckpointError: The tensor was not announced, was already written, or has another
                shape or dtype.
        """
        slot = self._slots.get(name)
        if slot is None or name not in self._awaited:
            state = "not announced" if slot is None else "already written"
            raise CheckpointError(f"{name} is {state} for {self.folder}")
        if (tuple(tensor.shape), tensor.dtype) != (slot.shape, slot.dtype):
            raise CheckpointError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype}, but was announced as {slot}"
            )
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        with (self._partial / slot.file).open("r+b") as file:
            file.seek(slot.offset)
            file.write(memoryview(raw.numpy()))
        if len(raw):
            block = Block(slot.offset, len(raw), checksum(memoryview(raw.numpy())))
            self._blocks[slot.file][slot.offset] = block
        self._awaited.remove(name)
        self._unflushed_bytes += len(raw)
        if self._unflushed_bytes >= _FLUSH_BYTES:
            self._unflushed_bytes = 0
            self._flushes.append(self._flusher.submit(fsync, self._partial / slot.file))

    def add_file(self, name: str, source: bytes | Path) -> None:
        """Add a file next to the tensors: config.json, tokenizer.json, ...

        Args:
            name: A file name, without folders.
            source: Its content, or a file to copy.
        """
        assert Path(name).name == name, f"must be a file name without folders: {name}"
        path = self._partial / name
        assert not path.exists(), f"{name} already exists in {self.folder}"
        if isinstance(source, Path):
            shutil.copyfile(source, path)
        else:
            path.write_bytes(source)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._flusher.shutdown(cancel_futures=True)
            shutil.rmtree(self._partial, ignore_errors=True)

    def _allocate(self) -> None:
        for file, num_bytes in self._file_bytes().items():
            with (self._partial / file).open("wb") as stream:
                stream.write(self._headers[file])
                stream.truncate(num_bytes)

    def _file_bytes(self) -> dict[str, int]:
        file_bytes = {file: len(header) for file, header in self._headers.items()}
        for slot in self._slots.values():
            file_bytes[slot.file] += _num_bytes(slot.shape, slot.dtype)
        return file_bytes

    def _finish(self) -> None:
        if self._awaited:
            names = sorted(self._awaited)
            raise CheckpointError(
                f"{self.folder} is not complete: {len(names)} of {len(self._slots)} tensors were "
                f"not written.\n    " + "\n    ".join(names[:20])
            )
        for flush in self._flushes:
            flush.result()
        if len(self._headers) > 1:
            self.add_file(INDEX_FILE, self._index())
        write_checksums(self._partial, self._blocks)
        for path in self._partial.iterdir():
            fsync(path)
        fsync(self._partial)
        self._partial.rename(self.folder)
        fsync(self.folder.parent)

    def _index(self) -> bytes:
        total = sum(_num_bytes(slot.shape, slot.dtype) for slot in self._slots.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: self._slots[name].file for name in sorted(self._slots)},
        }
        return (json.dumps(index, indent=2) + "\n").encode()


def _lay_out(
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], max_shard_bytes: int
) -> tuple[dict[str, bytes], dict[str, _Slot]]:
    """Return the header of every file, and the location of every tensor."""
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, (shape, dtype) in tensors.items():
        num_bytes = _num_bytes(shape, dtype)
        if num_bytes > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= num_bytes
    headers, slots = {}, {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        file = SINGLE_FILE if len(shards) == 1 else file
        # Wide dtypes first, as in the safetensors library, so that every tensor is aligned.
        names.sort(key=lambda name: -tensors[name][1].itemsize)
        headers[file], offsets = _header({name: tensors[name] for name in names})
        for name in names:
            shape, dtype = tensors[name]
            slots[name] = _Slot(tuple(shape), dtype, file, len(headers[file]) + offsets[name])
    return headers, slots


def _header(
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
) -> tuple[bytes, dict[str, int]]:
    """Return the header of a file, and the offset of each tensor after the header."""
    # transformers 4 rejects a file without the format of its framework.
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **MARK}}
    offsets, end = {}, 0
    for name, (shape, dtype) in tensors.items():
        offsets[name], end = end, end + _num_bytes(shape, dtype)
        entries[name] = {
            "dtype": NAME_IN_SAFETENSORS[dtype],
            "shape": list(shape),
            "data_offsets": [offsets[name], end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, offsets


def _num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize
