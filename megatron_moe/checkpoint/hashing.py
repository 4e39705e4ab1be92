"""Compute the checksum of each tensor while torch's distributed checkpoint writes it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import IOBase
from pathlib import Path
from queue import Queue
from typing import Any, cast

import xxhash
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem, _write_files_from_queue
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.serialization import get_crc32_options, set_crc32_options

from megatron_moe.errors import CheckpointError
from megatron_moe.hf.checksums import Block, Blocks
from megatron_moe.hf.disk import refusal

_PART_BYTES = 4 * 2**20
"""Bytes that are hashed and then written at once: more leave the cache, fewer cost more calls."""


@dataclass(frozen=True)
class _Written(WriteResult):
    """A written tensor with its checksum; torch gathers these on rank 0."""

    checksum: str


class HashingWriter(FileSystemWriter):
    """torch's writer, which fsyncs its files and knows the checksum of each tensor.

    Args:
        folder: Where to write.
        files_at_once: Number of files, and of threads that write them.
    """

    def __init__(self, folder: Path, *, files_at_once: int) -> None:
        super().__init__(folder, sync_files=True, thread_count=files_at_once)
        self._hashing = self.fs = _HashingFiles()
        self.blocks: Blocks = {}
        """Checksums of all ranks' tensors by file, on rank 0 after all have written."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's tensors; the results carry their checksums."""
        try:
            results = super().write_data(plan, planner).wait()
        except OSError as error:
            needed = sum(map(_num_bytes, plan.items))
            raise CheckpointError(refusal(error, Path(self.path), needed=needed)) from None
        checked: Future[list[WriteResult]] = Future()
        checked.set_result([self._checked(result) for result in results])
        return checked

    def _write_data(
        self, planner: SavePlanner, file_queue: Queue[Any]
    ) -> Future[list[WriteResult]]:
        """Write the files; raise the error of any thread.

        torch's own threads print their errors and leave out the tensors they had to write.
        """
        written: Queue[list[WriteResult]] = Queue()
        with _threads_without_crc32(self.thread_count) as threads:
            running = [
                threads.submit(
                    _write_files_from_queue,
                    self.fs.create_stream,
                    file_queue,
                    written,
                    planner,
                    self.transforms,
                    self.per_thread_copy_ahead,
                    self.sync_files,
                    self.thread_count,
                    self.serialization_format,
                )
                for _ in range(self.thread_count)
            ]
        for thread in running:
            if (error := thread.exception()) is not None:
                raise self._hashing.refused or error
        results: Future[list[WriteResult]] = Future()
        results.set_result([result for one in list(written.queue) for result in one])
        return results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index, on rank 0, and collect the checksums."""
        blocks: dict[str, dict[int, Block]] = {}
        for result in (cast(_Written, one) for of_rank in results for one in of_rank):
            file, offset = result.storage_data.relative_path, result.storage_data.offset
            block = Block(offset, result.storage_data.length, result.checksum)
            blocks.setdefault(file, {})[offset] = block
        self.blocks = blocks
        super().finish(metadata, results)

    def _checked(self, result: WriteResult) -> _Written:
        where = result.storage_data
        checksum = self._hashing.checksums[where.relative_path, where.offset, where.length]
        return _Written(result.index, result.size_in_bytes, where, checksum)


@contextlib.contextmanager
def _threads_without_crc32(count: int) -> Iterator[ThreadPoolExecutor]:
    """Yield threads in which torch does not compute a CRC32, which nothing reads.

    The option belongs to a thread or, in torch 2.11, to the process.
    """
    before = get_crc32_options()
    try:
        with ThreadPoolExecutor(count, initializer=set_crc32_options, initargs=(False,)) as threads:
            yield threads
    finally:
        set_crc32_options(before)


def _num_bytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize


class _HashingFiles(FileSystem):
    """Open files whose bytes pass through a checksum."""

    def __init__(self) -> None:
        super().__init__()
        self.checksums: dict[tuple[str, int, int], str] = {}
        """Checksums by file, first byte and number of bytes."""
        self.refused: OSError | None = None
        """Error of the system, which torch hides behind one of its own."""

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[IOBase]:
        """Open a file."""
        with super().create_stream(path, mode) as stream:
            try:
                hashed: Any = _Hashed(stream, Path(path).name, self)
                yield hashed if "w" in mode else stream
            except OSError as error:
                self.refused = self.refused or error
                raise


class _Hashed:
    """A file that notes a checksum for the bytes between two calls of ``tell``.

    torch calls it before and after each tensor, to record where the tensor lies.
    """

    def __init__(self, stream: Any, name: str, files: _HashingFiles) -> None:
        self._stream, self._name, self._files = stream, name, files
        self._digest, self._start, self._end = xxhash.xxh3_64(), 0, 0

    def write(self, data: memoryview) -> int:
        """Write and hash, in parts that are still in the cache when they are written."""
        for first in range(0, len(data), _PART_BYTES):
            part = data[first : first + _PART_BYTES]
            self._digest.update(part)
            try:
                self._end += self._stream.write(part)
            except OSError as error:
                self._files.refused = self._files.refused or error
                raise
        return len(data)

    def tell(self) -> int:
        """Return the position; it ends one tensor and begins the next."""
        length = self._end - self._start
        if length:
            self._files.checksums[self._name, self._start, length] = self._digest.hexdigest()
            self._digest, self._start = xxhash.xxh3_64(), self._end
        return self._end

    def flush(self) -> None:
        """Flush to the system."""
        self._stream.flush()

    def fileno(self) -> int:
        """Return the descriptor, for fsync."""
        return self._stream.fileno()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()
