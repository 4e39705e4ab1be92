"""Documents of text files, a piece at a time, so that memory does not grow with the input.

A JSONL file holds one document a line, under the key ``text``. Any other file is one document of
plain UTF-8. A document longer than `PIECE_CHARACTERS` comes in several pieces that are tokenized
apart. They are cut between a letter or digit and the white space after it, where the byte-level
BPEs of Llama 3, Qwen and GPT-2 never merge, so their ids do not change; SentencePiece, or a text
without such a place, may differ by a token per cut.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_moe.errors import DataError

PIECE_CHARACTERS = 1 << 20
JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")

_LAST_CUT = re.compile(r"(?s:.*)[^\W_](?=\s)")


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a document, in the order of the file."""

    text: str

    ends_document: bool
    """The next piece belongs to the next document."""

    end_byte: int
    """Bytes of the file read so far, for the progress bar."""


def read_pieces(path: Path) -> Iterator[Piece]:
    """The non-empty documents of a text or JSONL file, piece by piece.

    Raises:
        DataError: Not UTF-8, or a line that is not an object with a string ``text``; the message
            opens with ``file:line``.
    """
    if path.suffix in JSONL_SUFFIXES:
        yield from _jsonl_pieces(path)
    else:
        yield from _text_pieces(path)


def parse_line(line: bytes) -> str:
    """The text of one JSONL line.

    Raises:
        ValueError: Why the line is malformed, in words for the user.
    """
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start} of the line") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(record, dict):
        raise ValueError(f"must be an object with the key 'text', not {type(record).__name__}")
    if "text" not in record:
        raise ValueError(f"has no key 'text', only {', '.join(map(repr, sorted(record)))}")
    if not isinstance(record["text"], str):
        raise ValueError(f"'text' must be a string, not {type(record['text']).__name__}")
    return record["text"]


def split_pieces(text: str, *, size: int = PIECE_CHARACTERS) -> Iterator[str]:
    """``text`` in pieces of about ``size`` characters, cut where tokens do not cross."""
    start = 0
    while len(text) - start > size:
        end = _cut(text, start, start + size)
        yield text[start:end]
        start = end
    yield text[start:]


def _cut(text: str, start: int, end: int) -> int:
    """Where to end the piece that begins at ``start``: the last good place up to ``end``."""
    # One character more, for white space that stands right behind the piece.
    found = _LAST_CUT.match(text, start, end + 1)
    return found.end() if found else end


def _jsonl_pieces(path: Path) -> Iterator[Piece]:
    end_byte = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            end_byte += len(line)
            if not line.strip():
                continue
            try:
                text = parse_line(line)
            except ValueError as error:
                raise DataError(f"{path}:{number}: {error}") from error
            if text:
                *head, tail = split_pieces(text)
                yield from (Piece(piece, False, end_byte) for piece in head)
                yield Piece(tail, True, end_byte)


def _text_pieces(path: Path) -> Iterator[Piece]:
    held, end_byte = "", 0
    for block in _decoded_blocks(path):
        end_byte += len(block.encode())
        *head, held = split_pieces(held + block)
        yield from (Piece(piece, False, end_byte) for piece in head)
    if held:
        yield Piece(held, True, end_byte)


def _decoded_blocks(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    with path.open("rb") as file:
        while block := file.read(PIECE_CHARACTERS):
            if 0 in block:
                number = line + block[: block.index(0)].count(b"\n")
                raise DataError(f"{path}:{number}: a zero byte: this is a binary file, not text")
            try:
                yield decoder.decode(block)
            except UnicodeDecodeError as error:
                number = line + error.object[: error.start].count(b"\n")
                raise DataError(f"{path}:{number}: not UTF-8: {error.reason}") from error
            line += block.count(b"\n")
        try:
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{line}: the file ends inside a character") from error
