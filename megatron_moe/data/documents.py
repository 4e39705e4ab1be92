"""Documents of files, in blocks of about a mebibyte, so that memory does not grow with the input.

========================  ==================================================================
``.jsonl .ndjson .json``  one document a line, under the key ``text`` or another
``.parquet .arrow``       one document a row, in the column of that name; needs pyarrow
anything else             the whole file is one document of plain UTF-8
========================  ==================================================================

Each but the second may be compressed (``.gz``, or ``.zst`` with the package zstandard). A reader
can begin at any `Place` that an earlier block ended at.
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
# What a folder is searched for: a README or a dataset_info.json beside the data is no document.
_FOLDER_PATTERN = re.compile(r".*\.(jsonl|ndjson|parquet|arrow|txt)(\.gz|\.zst)?")

_LAST_CUT = re.compile(r"(?s:.*)[^\W_](?=\s)")


@dataclass(frozen=True, slots=True)
class Place:
    """How far into the inputs a reader has come."""

    file: int = 0
    """Index of the file."""

    offset: int = 0
    """Bytes after decompression, or rows, of the file that are done."""

    line: int = 0
    """Lines or rows of the file that are done."""

    read_bytes: int = 0
    """Bytes of the file as it lies on disk, for the progress bar."""


@dataclass(frozen=True, slots=True)
class Block:
    """Some consecutive documents of one file, or a part of one long document."""

    path: Path

    first_line: int
    """Number of the first record, counted from 1."""

    records: Sequence[bytes | str | None]
    """JSON lines as bytes, or texts; None is a row without text."""

    after: Place
    """Where the next block begins."""

    starts_document: bool = True
    ends_document: bool = True


def find_files(inputs: Sequence[Path]) -> list[Path]:
    """The files among ``inputs``, and those in its folders, in the order of their names.

    Raises:
        DataError: Something does not exist, or nothing is there.
    """
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            files += sorted(p for p in path.rglob("*") if _FOLDER_PATTERN.fullmatch(p.name))
        elif path.exists():
            files.append(path)
        else:
            raise DataError(f"there is no text at {path}")
    if not files:
        folders = ", ".join(map(str, inputs))
        raise DataError(f"no .jsonl, .parquet, .arrow or .txt file (also .gz, .zst) in {folders}")
    return files


def read_blocks(files: Sequence[Path], *, text_key: str, start: Place) -> Iterator[Block]:
    """The blocks of ``files`` from ``start`` on.

    Raises:
        DataError: A damaged file, a text file that is not UTF-8 (with ``file:line``), a table
            without the column, a package that is not installed.
    """
    for index, path in islice(enumerate(files), start.file, None):
        place = start if index == start.file else Place(file=index)
        yield from _file_blocks(path, place, text_key)


def split_pieces(text: str, *, size: int | None = None) -> Iterator[str]:
    """``text`` in pieces of at most ``size`` characters (`BLOCK_SIZE`), to be tokenized apart.

    They end between a letter or digit and the white space after it, where the byte-level BPEs of
    Llama 3, Qwen and GPT-2 never merge, so the ids are those of the whole. With SentencePiece, or
    in a text without such a place, they may differ by a token per cut.
    """
    size, start = size or BLOCK_SIZE, 0
    while len(text) - start > size:
        # One character more, for white space that stands right behind the piece.
        found = _LAST_CUT.match(text, start, start + size + 1)
        end = found.end() if found else start + size
        yield text[start:end]
        start = end
    yield text[start:]


def _file_blocks(path: Path, place: Place, text_key: str) -> Iterator[Block]:
    suffixes = [s for s in path.suffixes if s not in _COMPRESSED_SUFFIXES]
    suffix = suffixes[-1] if suffixes else ""
    if suffix in _TABLE_SUFFIXES:
        yield from _table_blocks(path, place, text_key)
        return
    blocks = _line_blocks if suffix in _LINE_SUFFIXES else _text_blocks
    damages: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
    if path.suffix == ".zst":
        damages += (_package("zstandard", path).ZstdError,)
    try:
        with path.open("rb") as raw:
            yield from blocks(path, place, _decompressed(path, raw), raw)
    except damages as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _decompressed(path: Path, raw: BinaryIO) -> BinaryIO:
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))
    if path.suffix == ".zst":
        decompressor = _package("zstandard", path).ZstdDecompressor()
        return io.BufferedReader(decompressor.stream_reader(raw, read_across_frames=True))
    return raw


def _line_blocks(path: Path, place: Place, stream: BinaryIO, raw: BinaryIO) -> Iterator[Block]:
    _skip(stream, place.offset)
    offset, line = place.offset, place.line
    while lines := stream.readlines(BLOCK_SIZE):
        first = line + 1
        offset, line = offset + sum(map(len, lines)), line + len(lines)
        yield Block(path, first, lines, Place(place.file, offset, line, raw.tell()))


def _text_blocks(path: Path, place: Place, stream: BinaryIO, raw: BinaryIO) -> Iterator[Block]:
    _skip(stream, place.offset)
    held, offset, line = "", place.offset, place.line
    for text in _decoded(path, stream, line):
        *pieces, held = split_pieces(held + text)
        for piece in pieces:
            first, starts = line + 1, offset == 0
            offset, line = offset + len(piece.encode()), line + piece.count("\n")
            after = Place(place.file, offset, line, raw.tell())
            yield Block(path, first, [piece], after, starts_document=starts, ends_document=False)
    after = Place(place.file + 1)
    yield Block(path, line + 1, [held], after, starts_document=offset == 0)


def _decoded(path: Path, stream: BinaryIO, line: int) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    line += 1
    while block := stream.read(BLOCK_SIZE):
        if 0 in block:
            number = line + block[: block.index(0)].count(b"\n")
            raise DataError(f"{path}:{number}: a zero byte: this is a binary file, not text")
        try:
            yield decoder.decode(block)
        except UnicodeDecodeError as error:
            number = line + error.object[: error.start].count(b"\n")
            raise DataError(f"{path}:{number}: not UTF-8: {error.reason}") from error
        line += block.count(b"\n")
    if decoder.getstate()[0]:
        raise DataError(f"{path}:{line}: not UTF-8: the file ends inside a character")


def _table_blocks(path: Path, place: Place, text_key: str) -> Iterator[Block]:
    batches = _record_batches(path, text_key)
    size, row = path.stat().st_size, 0
    for column, num_rows in batches:
        row += len(column)
        if row > place.offset:
            done = Place(place.file, row, row, size * row // num_rows if num_rows else 0)
            yield Block(path, row - len(column) + 1, column, done)


def _record_batches(path: Path, text_key: str) -> Iterator[tuple[list[str | None], int]]:
    """The text column in parts, each with the rows of the file (0 where nobody counted them)."""
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
    # A compressed stream cannot seek; reading is right for all, and fast beside tokenizing.
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
