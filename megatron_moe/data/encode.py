"""Tokenize one block of documents: the work of one worker, as a pure function.

Shape letters: ``T`` tokens of the block, ``Q`` its sequences.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace

import numpy as np
from megatron.core.datasets.indexed_dataset import DType
from numpy.typing import NDArray

from megatron_moe.data.documents import Block, split_pieces
from megatron_moe.data.tokenizer import Tokenizer
from megatron_moe.json_text import parse_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Filters for documents. Every field can change the token file."""

    text_key: str = "text"
    """Key or column that holds the text."""

    add_bos: bool = False
    """Begin each document with the tokenizer's begin-of-text token."""

    drop_duplicates: bool = False
    """Keep only the first of several documents with exactly the same text."""

    min_tokens: int = 1
    """Minimum length of a document, without the end-of-text token; skip shorter ones."""

    max_tokens: int | None = None
    """Maximum length of a document; skip longer ones. None is no limit."""


@dataclass(slots=True)
class Counts:
    """Counts of documents kept and skipped, and of their tokens and characters."""

    documents: int = 0
    tokens: int = 0
    characters: int = 0
    empty: int = 0
    duplicates: int = 0
    too_short: int = 0
    too_long: int = 0
    malformed: int = 0

    def add(self, other: Counts) -> None:
        """Add the counts of ``other`` in place."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def left_out(self) -> str:
        """Describe the skipped documents, e.g. ``3 empty, 1 malformed``."""
        reasons = ("empty", "duplicates", "too_short", "too_long", "malformed")
        parts = [f"{getattr(self, r)} {r.replace('_', ' ')}" for r in reasons if getattr(self, r)]
        return ", ".join(parts) or "none skipped"


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token sequences of one block."""

    ids_T: NDArray[np.number]
    """All sequences, concatenated."""

    lengths_Q: list[int]

    characters_Q: list[int]

    digests_Q: list[bytes]
    """Hash of each document's text; empty unless duplicates are dropped."""

    starts_document: bool
    ends_document: bool

    counts: Counts
    """Skipped documents, by reason."""

    malformed: list[str]
    """``file:line: reason`` for each malformed record."""

    def only(self, kept: list[int]) -> Encoded:
        """Return a copy with only the sequences ``kept``, as indices."""
        if len(kept) == len(self.lengths_Q):
            return self
        ends_Q = np.cumsum(self.lengths_Q)
        rows = [self.ids_T[ends_Q[i] - self.lengths_Q[i] : ends_Q[i]] for i in kept]
        return replace(
            self,
            ids_T=np.concatenate([self.ids_T[:0], *rows]),
            lengths_Q=[self.lengths_Q[i] for i in kept],
            characters_Q=[self.characters_Q[i] for i in kept],
            digests_Q=[self.digests_Q[i] for i in kept],
        )


def encode_block(block: Block, tokenizer: Tokenizer, rules: Rules) -> Encoded:
    """Tokenize the documents of ``block`` and filter them by ``rules``.

    A document that lies in one block becomes one sequence. Filters and digests ignore a text file
    that spans several blocks, because no single block holds all of it.
    """
    counts, malformed, texts, numbers = Counts(), [], [], []
    for number, record in enumerate(block.records, start=block.first_line):
        try:
            text = _text(record, rules.text_key)
        except ValueError as error:
            malformed.append(f"{block.path}:{number}: {error}")
            continue
        if text:
            texts.append(text)
            numbers.append(number)
        elif text is not None:
            counts.empty += 1
    rows = _encode_texts(texts, tokenizer)
    whole = block.starts_document and block.ends_document
    kept = []
    for i, row in enumerate(rows):
        if tokenizer.rows is not None and row.size and row.max() >= tokenizer.rows:
            token = tokenizer.decode([int(row.max())])
            malformed.append(f"{block.path}:{numbers[i]}: no row of the embedding for {token!r}")
        elif not whole or _fits(len(row), rules, counts):
            kept.append(i)
    counts.malformed = len(malformed)
    begins = rules.add_bos and block.starts_document and tokenizer.bos_id is not None
    first = np.array([tokenizer.bos_id] if begins else [], dtype=np.int64)
    last = np.array([tokenizer.eos_id] if block.ends_document else [], dtype=np.int64)
    sequences = [np.concatenate([first, rows[i], last]) for i in kept]
    digests = [_digest(texts[i]) for i in kept] if whole and rules.drop_duplicates else []
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    return Encoded(
        ids_T=np.concatenate([np.empty(0, dtype=np.int64), *sequences]).astype(dtype),
        lengths_Q=[len(sequence) for sequence in sequences],
        characters_Q=[len(texts[i]) for i in kept],
        digests_Q=digests,
        starts_document=block.starts_document,
        ends_document=block.ends_document,
        counts=counts,
        malformed=malformed,
    )


def parse_line(line: bytes, text_key: str) -> str:
    """Return the text of one JSONL line.

    Raises:
        ValueError: The line is malformed; the message gives the reason.
    """
    try:
        record = parse_json(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start} of the line") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("cannot parse the JSON: nested too deeply") from error
    if not isinstance(record, dict):
        raise ValueError(f"must be an object with the key {text_key!r}, not {_kind(record)}")
    if text_key not in record:
        raise ValueError(f"has no key {text_key!r}, only {', '.join(map(repr, sorted(record)))}")
    if not isinstance(record[text_key], str):
        raise ValueError(f"{text_key!r} must be a string, not {_kind(record[text_key])}")
    return record[text_key]


def _text(record: bytes | str | None, text_key: str) -> str | None:
    """Return the text of a record, or None for a blank line, which is not a document."""
    if record is None:
        raise ValueError(f"{text_key!r} is null")
    if isinstance(record, bytes):
        record = parse_line(record, text_key) if record.strip() else None
    return _encodable(record) if record else record


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can contain half of a surrogate pair
        raise ValueError(f"not Unicode text: {error.reason}") from error
    return text


def _encode_texts(texts: list[str], tokenizer: Tokenizer) -> list[NDArray[np.int64]]:
    """Tokenize each text; long texts are split into pieces to keep all threads busy."""
    pieces = [list(split_pieces(text)) for text in texts]
    ids = iter(tokenizer.encode_batch([piece for of_text in pieces for piece in of_text]))
    return [
        np.concatenate([np.asarray(next(ids), dtype=np.int64) for _ in of_text])
        for of_text in pieces
    ]


def _fits(length: int, rules: Rules, counts: Counts) -> bool:
    if length < rules.min_tokens:
        counts.too_short += 1
        return False
    if rules.max_tokens is not None and length > rules.max_tokens:
        counts.too_long += 1
        return False
    return True


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _kind(value: object) -> str:
    return type(value).__name__
