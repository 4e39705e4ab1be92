"""Write and check the file ``CHECKSUMS`` of a folder, which covers every byte of its other files.

::

    megatron_moe checksums 1 xxh3_64 5f1c...      of all bytes after this line
    9b00c1a2d3e4f501 0 1184 __0_0.distcp          checksum, first byte, number of bytes, file
    0a41d5...        1184 66736 __0_0.distcp

A file of tensors has one block for each tensor, so that whoever reads one tensor can check it
without reading the rest of the file. All other files have one block.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import xxhash

from megatron_moe.errors import CheckpointError
from megatron_moe.regular_file import regular

FILE = "CHECKSUMS"
MARK = {"megatron_moe.checksums": FILE}
"""Metadata of weights that were written with ``CHECKSUMS`` beside them: without it, it is lost."""
_TITLE = "megatron_moe checksums 1 xxh3_64"
_LINE = re.compile(r"([0-9a-f]{16}) ([0-9]{1,18}) ([0-9]{1,18}) ([^\0]+)")
_MOST_BYTES = 2**30
"""Upper bound for the size of ``CHECKSUMS``: lines of about ten million tensors."""
_CHUNK_BYTES = 2**20
"""Bytes per read, few enough to be in the cache when they are hashed."""


@dataclass(frozen=True, slots=True)
class Block:
    """A run of bytes of a file, and its checksum."""

    offset: int
    length: int
    checksum: str


Blocks = Mapping[str, Mapping[int, Block]]
"""Blocks by the file's path in its folder and their first byte; together they cover the file."""


def checksum(data: bytes | memoryview) -> str:
    """Return the XXH3 checksum of some bytes, as 16 hexadecimal digits.

    >>> checksum(b"")
    '2d06800538d394c2'
    """
    return xxhash.xxh3_64_hexdigest(data)


def write_checksums(folder: Path, blocks: Blocks) -> None:
    """Write ``CHECKSUMS`` into a folder.

    Args:
        folder: Folder with all its files, which nobody writes to any more.
        blocks: Checksums that were computed while files were written. Other files are read.
    """
    lines = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        assert "\n" not in name, f"{path} has a line break in its name"
        held = blocks[name].values() if name in blocks else [_whole(path)]
        lines += [f"{b.checksum} {b.offset} {b.length} {name}\n" for b in held]
    text = os.fsencode("".join(lines))
    (folder / FILE).write_bytes(f"{_TITLE} {checksum(text)}\n".encode() + text)


def _whole(path: Path) -> Block:
    return Block(0, *file_checksum(path))


def file_checksum(path: Path, seen: Callable[[int], None] | None = None) -> tuple[int, str]:
    """Return the size of a file in bytes, and its checksum.

    Args:
        path: The file.
        seen: Called with the number of bytes after each part that was read.
    """
    with regular(path).open("rb") as file:
        return _digest(file, path.stat().st_size, seen)


def _digest(
    file: IO[bytes], length: int, seen: Callable[[int], None] | None = None
) -> tuple[int, str]:
    """Read ``length`` bytes; return the number of bytes that there were, and their checksum."""
    digest, left = xxhash.xxh3_64(), length
    buffer = memoryview(bytearray(min(_CHUNK_BYTES, length)))
    while left and (count := file.readinto(buffer[:left])):  # type: ignore[attr-defined]
        digest.update(buffer[:count])
        left -= count
        if seen is not None:
            seen(count)
    return length - left, digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Checksums:
    """Contents of a folder's ``CHECKSUMS``."""

    folder: Path
    blocks: Blocks

    def check(self, name: str, data: bytes | memoryview, *, offset: int = 0) -> None:
        """Compare bytes that were read with their checksum.

        Args:
            name: The file's path in its folder.
            data: All bytes of one block.
            offset: First byte of the block.

        Raises:
            CheckpointError: They differ, or no block of this file begins there.
        """
        block = self.blocks.get(name, {}).get(offset)
        if block is None:
            raise CheckpointError(
                f"{self.folder / name} has no checksum at byte {offset} in {FILE}"
            )
        self._compare(name, block, len(data), checksum(data))

    def check_block(self, name: str, file: IO[bytes], *, offset: int) -> None:
        """Read one block of an open file and compare it with its checksum; no memory holds it.

        Args:
            name: The file's path in its folder.
            file: The file.
            offset: First byte of the block.

        Raises:
            CheckpointError: They differ, or no block of this file begins there.
        """
        block = self._block(name, offset)
        file.seek(offset)
        length, actual = _digest(file, block.length)
        self._compare(name, block, length, actual)

    def check_file(self, name: str, *, seen: Callable[[int], None] | None = None) -> None:
        """Read all of a file and compare it with its checksums.

        Args:
            name: The file's path in its folder.
            seen: Called with the number of bytes after each part that was read.

        Raises:
            CheckpointError: The file differs, has another size, or cannot be read.
        """
        path, end = self.folder / name, 0
        try:
            with regular(path).open("rb") as file:
                for _, block in sorted(self.blocks[name].items()):
                    if block.offset != end:
                        raise CheckpointError(f"{path} has no checksum at byte {end} in {FILE}")
                    length, actual = _digest(file, block.length, seen)
                    end += block.length
                    self._compare(name, block, length, actual)
                if file.read(1):
                    raise CheckpointError(f"{path} is damaged: it must have {end} bytes, not more")
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error

    def _block(self, name: str, offset: int) -> Block:
        block = self.blocks.get(name, {}).get(offset)
        if block is None:
            raise CheckpointError(
                f"{self.folder / name} has no checksum at byte {offset} in {FILE}"
            )
        return block

    def _compare(self, name: str, block: Block, length: int, actual: str) -> None:
        end = block.offset + block.length
        if length != block.length:
            path, written = self.folder / name, self.blocks[name].values()
            raise CheckpointError(
                f"{path} is damaged: it has {path.stat().st_size} bytes, but "
                f"{max(one.offset + one.length for one in written)} were written"
            )
        if actual != block.checksum:
            raise CheckpointError(
                f"{self.folder / name} is damaged: bytes {block.offset} to {end} have checksum "
                f"{actual}, but {block.checksum} was written"
            )


def read_checksums(folder: Path) -> Checksums | None:
    """Read a folder's ``CHECKSUMS``; return None if there is none.

    Raises:
        CheckpointError: The file is damaged.
    """
    path = folder / FILE
    if not os.path.lexists(path):
        return None
    title, _, text = _content(path).partition(b"\n")
    if title != f"{_TITLE} {checksum(text)}".encode():
        raise CheckpointError(f"{path} is damaged: its first line does not fit the others")
    blocks: dict[str, dict[int, Block]] = {}
    for line in os.fsdecode(text).split("\n")[:-1]:
        if (parsed := _parse(line)) is None:
            raise CheckpointError(f"{path} has a line that is no checksum: {line!r:.200}")
        name, block = parsed
        if not _is_inside(name):
            raise CheckpointError(f"{path} lists {name!r}, which is outside its folder")
        if block.offset in blocks.setdefault(name, {}):
            raise CheckpointError(f"{path} lists byte {block.offset} of {name!r} twice")
        blocks[name][block.offset] = block
    return Checksums(folder, blocks)


def readable_checksums(folder: Path) -> Checksums:
    """Return what can be read of a damaged ``CHECKSUMS``; its lines may be wrong."""
    try:
        text = os.fsdecode(_content(folder / FILE))
    except CheckpointError:
        text = ""
    blocks: dict[str, dict[int, Block]] = {}
    for name, block in filter(None, map(_parse, text.split("\n"))):
        if _is_inside(name) and _is_file(folder / name):
            blocks.setdefault(name, {})[block.offset] = block
    return Checksums(folder, blocks)


def _content(path: Path) -> bytes:
    try:
        size = regular(path).stat().st_size
        if size > _MOST_BYTES:
            raise CheckpointError(f"{path} is damaged: it has {size} bytes, too many for checksums")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def _parse(line: str) -> tuple[str, Block] | None:
    """Return the file and the block of a line; None if it is no line of ``CHECKSUMS``."""
    if (fields := _LINE.fullmatch(line)) is None:
        return None
    return fields[4], Block(int(fields[2]), int(fields[3]), fields[1])


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a damaged name may be too long
        return False


def _is_inside(name: str) -> bool:
    return not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
