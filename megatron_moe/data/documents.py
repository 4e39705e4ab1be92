"""Read documents from files in blocks of about 1 MiB, so that memory does not grow with the input.

========================  ==================================================================
``.jsonl .ndjson .json``  one document per line, under the key ``text`` or another
``.parquet .arrow``       one document per row, in the column of that name; needs pyarrow
anything else             the whole file is one document of plain UTF-8
========================  ==================================================================

All but the second may be compressed (``.gz``, or ``.zst`` with the package zstandard). A reader
can start at any `ReadPosition` where an earlier block ended.
"""

from __future__ import annotations

import codecs
import gzip
import importlib
import io
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from megatron_moe.errors import DataError

BLOCK_SIZE = 1 << 20
_ROWS = 256

_LINE_SUFFIXES = (".jsonl", ".ndjson", ".json")
_TABLE_SUFFIXES = (".parquet", ".arrow")
_COMPRESSED_SUFFIXES = (".gz", ".zst")
# Files to read in a folder. A README or a dataset_info.json next to the data is not a document.
_FOLDER_PATTERN = re.compile(r".*\.(jsonl|ndjson|parquet|arrow|txt)(\.gz|\.zst)?")

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


def find_files(inputs: Sequence[Path]) -> list[Path]:
    """Return the files among ``inputs``, and those in its folders sorted by name.

    Raises:
        DataError: An input does not exist, or there is no file to read.
    """
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            files += sorted(p for p in path.rglob("*") if _FOLDER_PATTERN.fullmatch(p.name))
        elif path.exists():
            files.append(path)
        else:
            raise DataError(f"{path} does not exist")
    if not files:
        folders = ", ".join(map(str, inputs))
        raise DataError(f"no .jsonl, .parquet, .arrow or .txt file (also .gz, .zst) in {folders}")
    return files


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
    suffixes = [s for s in path.suffixes if s not in _COMPRESSED_SUFFIXES]
    suffix = suffixes[-1] if suffixes else ""
    if suffix in _TABLE_SUFFIXES:
        yield from _table_blocks(path, position, text_key)
        return
    blocks = _line_blocks if suffix in _LINE_SUFFIXES else _text_blocks
    damages: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
    if path.suffix == ".zst":
        damages += (_package("zstandard", path).ZstdError,)
    try:
        with path.open("rb") as raw:
            yield from blocks(path, position, _decompressed(path, raw), raw)
    except damages as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _decompressed(path: Path, raw: BinaryIO) -> BinaryIO:
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))
    if path.suffix == ".zst":
        decompressor = _package("zstandard", path).ZstdDecompressor()
        return io.BufferedReader(decompressor.stream_reader(raw, read_across_frames=True))
    return raw


def _line_blocks(
    path: Path, position: ReadPosition, stream: BinaryIO, raw: BinaryIO
) -> Iterator[Block]:
    _skip(stream, position.offset)
    offset, line = position.offset, position.line
    while lines := stream.readlines(BLOCK_SIZE):
        first = line + 1
        offset, line = offset + sum(map(len, lines)), line + len(lines)
        yield Block(path, first, lines, ReadPosition(position.file, offset, line, raw.tell()))


def _text_blocks(
    path: Path, position: ReadPosition, stream: BinaryIO, raw: BinaryIO
) -> Iterator[Block]:
    _skip(stream, position.offset)
    held, offset, line = "", position.offset, position.line
    for text in _decoded(path, stream, line):
        *pieces, held = split_pieces(held + text)
        for piece in pieces:
            first, starts = line + 1, offset == 0
            offset, line = offset + len(piece.encode()), line + piece.count("\n")
            after = ReadPosition(position.file, offset, line, raw.tell())
            yield Block(path, first, [piece], after, starts_document=starts, ends_document=False)
    after = ReadPosition(position.file + 1)
    yield Block(path, line + 1, [held], after, starts_document=offset == 0)


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
    batches = _record_batches(path, text_key)
    size, row = path.stat().st_size, 0
    for column, num_rows in batches:
        row += len(column)
        if row > position.offset:
            read_bytes = size * row // num_rows if num_rows else 0
            after = ReadPosition(position.file, row, row, read_bytes)
            yield Block(path, row - len(column) + 1, column, after)


def _record_batches(path: Path, text_key: str) -> Iterator[tuple[list[str | None], int]]:
    """Yield parts of the text column, each with the number of rows in the file (0 if unknown)."""
    arrow = _package("pyarrow", path)
    try:
        if path.suffix == ".parquet":
            file = _package("pyarrow.parquet", path).ParquetFile(path)
            _check_column(path, file.schema_arrow, text_key)
            for batch in file.iter_batches(_ROWS, columns=[text_key]):
                yield batch.column(0).to_pylist(), file.metadata.num_rows
        else:
            with arrow.memory_map(str(path)) as mapped:
                reader = arrow.ipc.open_stream(mapped)
                _check_column(path, reader.schema, text_key)
                for batch in reader:
                    yield batch.column(text_key).to_pylist(), 0
    except arrow.ArrowException as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _check_column(path: Path, schema: Any, text_key: str) -> None:
    if text_key not in schema.names:
        raise DataError(f"{path} has no column {text_key!r}, only {', '.join(schema.names)}")
    if str(schema.field(text_key).type) not in ("string", "large_string"):
        kind = schema.field(text_key).type
        raise DataError(f"{path}: column {text_key!r} must hold strings, not {kind}")


def _skip(stream: BinaryIO, count: int) -> None:
    # Compressed streams cannot seek. Reading works for all, and is fast compared to tokenizing.
    while count > 0 and (skipped := stream.read(min(count, BLOCK_SIZE))):
        count -= len(skipped)


def _package(name: str, path: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise DataError(
            f"{path} needs the package {package}, which is not installed.\n  pip install {package}"
        ) from error
