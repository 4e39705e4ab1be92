"""Read documents from files in blocks of about 1 MiB, so that memory does not grow with the input.

`data/files.py` lists the formats. A reader can start at any `ReadPosition` where an earlier block
ended.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from megatron_moe.data.files import compression_of, format_of
from megatron_moe.data.packages import package_for
from megatron_moe.data.tables import text_batches
from megatron_moe.data.zstd import ZstdReader
from megatron_moe.errors import DataError
from megatron_moe.regular_file import regular_or_shell_pipe

BLOCK_SIZE = 1 << 20
_BOM = codecs.BOM_UTF8
_JSON_RECORD = re.compile(rb'\s*\{\s*"[^"\n]{1,64}"\s*:')
_LAST_CUT = re.compile(r"(?s:.*)[^\W_](?=\s)")


@dataclass(frozen=True, slots=True)
class ReadPosition:
    """Position of a reader in its inputs."""

    file: int = 0
    """Index of the file."""

    offset: int = 0
    """Bytes (after decompression) or rows of the file that were read."""

    line: int = 0
    """Lines or rows of the file that were read."""

    read_bytes: int = 0
    """Bytes on disk that were read of the file, for the progress bar."""


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive documents of one file, or a part of one long document."""

    path: Path

    first_line: int
    """Number of the first record, counted from 1."""

    records: Sequence[bytes | str | None]
    """JSON lines as bytes, or texts; None is a row without text."""

    after: ReadPosition
    """Position where the next block begins."""

    starts_document: bool = True
    ends_document: bool = True


def read_blocks(files: Sequence[Path], *, text_key: str, start: ReadPosition) -> Iterator[Block]:
    """Yield the blocks of ``files`` from ``start`` on.

    Raises:
        DataError: A damaged file, a text file that is not UTF-8 (with ``file:line``), a table
            without the column, or a package that is not installed.
    """
    for index, path in islice(enumerate(files), start.file, None):
        position = start if index == start.file else ReadPosition(file=index)
        yield from _file_blocks(path, position, text_key)


def split_pieces(text: str, *, size: int | None = None) -> Iterator[str]:
    """Yield pieces of ``text`` of at most ``size`` characters (default `BLOCK_SIZE`).

    The pieces can be tokenized separately. They end between a letter or digit and the whitespace
    after it, where the byte-level BPEs of Llama 3, Qwen and GPT-2 never merge, so that their ids
    equal those of the whole text. With SentencePiece, or in a text without such a point, the ids
    may differ by a token per cut.
    """
    size, start = size or BLOCK_SIZE, 0
    while len(text) - start > size:
        # Look one character further, for whitespace directly after the piece.
        match = _LAST_CUT.match(text, start, start + size + 1)
        end = match.end() if match else start + size
        yield text[start:end]
        start = end
    yield text[start:]


def _file_blocks(path: Path, position: ReadPosition, text_key: str) -> Iterator[Block]:
    kind = format_of(path)
    if kind == "table":
        yield from _table_blocks(path, position, text_key)
        return
    blocks = _line_blocks if kind == "lines" else _text_blocks
    damages: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, lzma.LZMAError)
    if compression_of(path) == "zst":
        damages += (package_for("zstandard", path).ZstdError,)
    try:
        with regular_or_shell_pipe(path).open("rb") as raw:
            yield from blocks(path, position, _decompressed(path, raw), raw)
    except damages as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _decompressed(path: Path, raw: io.BufferedReader) -> io.BufferedReader:
    match compression_of(path):
        case "gz":
            stream = gzip.GzipFile(fileobj=raw)
        case "bz2":
            stream = bz2.BZ2File(raw)
        case "xz":
            stream = lzma.LZMAFile(raw)  # noqa: SIM115 - it is returned
        case "zst":
            stream = ZstdReader(raw, path)
        case _:
            return raw
    return io.BufferedReader(stream)


def _line_blocks(
    path: Path, position: ReadPosition, stream: io.BufferedReader, raw: BinaryIO
) -> Iterator[Block]:
    _skip(stream, position.offset)
    offset, line = position.offset, position.line
    while lines := stream.readlines(BLOCK_SIZE):
        first = line + 1
        offset, line = offset + sum(map(len, lines)), line + len(lines)
        yield Block(path, first, lines, ReadPosition(position.file, offset, line, raw.tell()))


def _text_blocks(
    path: Path, position: ReadPosition, stream: io.BufferedReader, raw: BinaryIO
) -> Iterator[Block]:
    bom = 0
    if position.offset == 0:
        bom = len(_BOM) if stream.peek(len(_BOM))[: len(_BOM)] == _BOM else 0
        _refuse_other_formats(path, stream.peek(BLOCK_SIZE))
    _skip(stream, position.offset or bom)
    held, offset, line = "", position.offset or bom, position.line
    for text in _decoded(path, stream, line):
        *pieces, held = split_pieces(held + text)
        for piece in pieces:
            first, starts = line + 1, offset == bom
            offset, line = offset + len(piece.encode()), line + piece.count("\n")
            after = ReadPosition(position.file, offset, line, raw.tell())
            yield Block(path, first, [piece], after, starts_document=starts, ends_document=False)
    after = ReadPosition(position.file + 1)
    yield Block(path, line + 1, [held], after, starts_document=offset == bom)


def _refuse_other_formats(path: Path, head: bytes) -> None:
    """Raise `DataError` if a text file holds JSON lines, or text that is not UTF-8."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(
            f"{path}:1: not UTF-8: the file is UTF-16.\n  convert it: iconv -f UTF-16 -t UTF-8"
        )
    if _JSON_RECORD.match(head.removeprefix(_BOM)):
        raise DataError(
            f"{path}:1: the file holds JSON lines, but its name means plain text, so the JSON "
            "itself would be the text.\n  rename it to end in .jsonl"
        )


def _decoded(path: Path, stream: BinaryIO, line: int) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    line += 1
    while block := stream.read(BLOCK_SIZE):
        if 0 in block:
            number = line + block[: block.index(0)].count(b"\n")
            raise DataError(f"{path}:{number}: zero byte: this is a binary file, not text")
        try:
            yield decoder.decode(block)
        except UnicodeDecodeError as error:
            number = line + error.object[: error.start].count(b"\n")
            raise DataError(f"{path}:{number}: not UTF-8: {error.reason}") from error
        line += block.count(b"\n")
    if decoder.getstate()[0]:
        raise DataError(f"{path}:{line}: not UTF-8: the file ends inside a character")


def _table_blocks(path: Path, position: ReadPosition, text_key: str) -> Iterator[Block]:
    size, row = path.stat().st_size, 0
    for column, num_rows in text_batches(path, text_key):
        row += len(column)
        if row > position.offset:
            read_bytes = size * row // num_rows if num_rows else 0
            after = ReadPosition(position.file, row, row, read_bytes)
            yield Block(path, row - len(column) + 1, column, after)


def _skip(stream: BinaryIO, count: int) -> None:
    # Compressed streams cannot seek. Reading works for all, and is fast compared to tokenizing.
    while count > 0 and (skipped := stream.read(min(count, BLOCK_SIZE))):
        count -= len(skipped)
