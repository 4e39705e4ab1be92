"""Decompress zstd files of any window and number of frames, and notice files that end too early."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, BinaryIO

from megatron_moe.data.packages import package_for

_LARGEST_WINDOW = 2**31
"""Bytes of the longest window that ``zstd --ultra --long=31`` writes."""
_CHUNK = 1 << 17


class ZstdReader(io.RawIOBase):
    """Read a zstd file; zstandard's own reader takes a truncated file for a complete one."""

    def __init__(self, source: BinaryIO, path: Path) -> None:
        self._source = source
        self._package = package_for("zstandard", path)
        self._frame: Any = None
        """Decompressor of the current frame; None between frames."""
        self._compressed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer``, as far as one piece of the file goes.

        Raises:
            EOFError: The file ends inside a frame.
        """
        while not self._ready:
            self._compressed = self._compressed or self._source.read(_CHUNK)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the file ends inside a zstd frame: it was truncated")
                return 0
            if self._frame is None:
                decompressor = self._package.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
                self._frame = decompressor.decompressobj()
            self._ready = memoryview(self._frame.decompress(self._compressed))
            self._compressed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count
