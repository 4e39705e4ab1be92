"""Read the tokens of a Megatron ``.bin/.idx`` pair as one long stream of documents.

Shape letters: ``T`` tokens.
"""

from __future__ import annotations

import hashlib
import struct
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset
from numpy.typing import NDArray

from megatron_moe.errors import DataError
from megatron_moe.regular_file import regular

Tokens = NDArray[np.int64]

# Almost any sample of a file reveals that it was made with another tokenizer, and ids are checked
# again on every read. Scanning terabytes before the first step would cost more than it is worth.
_PROBES = 64
_PROBE_TOKENS = 4096


class TokenStream:
    """Documents of a memory-mapped token file, concatenated and read by position."""

    def __init__(self, prefix: Path, *, vocab_size: int, documents: slice = slice(None)) -> None:
        """Open the pair ``prefix.bin``, ``prefix.idx``.

        Args:
            prefix: Path of the pair without its suffixes.
            vocab_size: Rows of the model's embedding; all ids must be smaller.
            documents: Range of documents that make up the stream.

        Raises:
            DataError: A file is missing, truncated or not a token file, or has ids out of range.
        """
        self.prefix = prefix
        self.vocab_size = vocab_size
        self._dataset = open_pair(prefix)
        self._itemsize = np.dtype(self._dataset.index.dtype).itemsize
        self._check_size()
        first, last, _ = documents.indices(len(self._dataset.document_indices) - 1)
        self._documents = range(first, last)
        self._first_token = self._start_of(first)
        self.num_tokens = self._start_of(last) - self._first_token
        self.num_documents = last - first
        for start in np.linspace(0, max(0, self.num_tokens - _PROBE_TOKENS), _PROBES, dtype=int):
            self.read(int(start), min(_PROBE_TOKENS, self.num_tokens))

    def read(self, start: int, count: int) -> Tokens:
        """Return tokens ``[start, start + count)`` of the stream, ``(count,)``.

        Raises:
            DataError: An id is not below ``vocab_size``.
        """
        # The builder writes documents back to back, so a position in the stream is a byte offset.
        tokens_T = self._dataset.bin_reader.read(
            self._dataset.index.dtype, count, (self._first_token + start) * self._itemsize
        ).astype(np.int64)
        check_ids(tokens_T, prefix=self.prefix, vocab_size=self.vocab_size)
        return tokens_T

    def document_starts(self, start: int, count: int) -> list[int]:
        """Return starts of documents in ``[start, start + count)``, relative to ``start``."""
        begin = self._first_token + start
        first = bisect_left(self._documents, begin, key=self._start_of)
        starts = []
        for document in self._documents[first:]:
            if (offset := self._start_of(document) - begin) >= count:
                break
            starts.append(offset)
        return starts

    def _start_of(self, document: int) -> int:
        """Return the first token of ``document``; one past the last gives the end of the file."""
        sequence = int(self._dataset.document_indices[document])
        if sequence == len(self._dataset):
            return self._tokens_in_file()
        return int(self._dataset.index.sequence_pointers[sequence]) // self._itemsize

    def _tokens_in_file(self) -> int:
        return int(self._dataset.sequence_lengths.sum(dtype=np.int64))

    def _check_size(self) -> None:
        expected = self._tokens_in_file() * self._itemsize
        size = Path(f"{self.prefix}.bin").stat().st_size
        if size != expected:
            raise DataError(
                f"{self.prefix}.bin has {size} bytes, but its index requires {expected} bytes for "
                f"{self._tokens_in_file()} tokens.\n  copy the pair again: the file was truncated, "
                "or the two files do not belong together"
            )


def fingerprint(prefix: Path) -> str:
    """Return a hash of a token file: of its size, its document lengths, and parts of its tokens."""
    digest = hashlib.sha256(Path(f"{prefix}.idx").read_bytes())
    size = Path(f"{prefix}.bin").stat().st_size
    with Path(f"{prefix}.bin").open("rb") as file:
        for probe in range(_PROBES):
            file.seek(max(0, size - _PROBE_TOKENS) * probe // (_PROBES - 1))
            digest.update(file.read(_PROBE_TOKENS))
    return f"{size} bytes, {digest.hexdigest()[:16]}"


def check_ids(tokens_T: Tokens, *, prefix: Path, vocab_size: int) -> None:
    """Raise `DataError` if the model's embedding has no row for an id."""
    bad_T = tokens_T[(tokens_T < 0) | (tokens_T >= vocab_size)]
    if bad_T.size:
        raise DataError(
            f"{prefix}.bin contains id {bad_T[0]}, but the model's vocab_size is {vocab_size}: the "
            "tokens were made with another tokenizer.\n  tokenize the text again"
        )


def split_documents(
    prefix: Path, *, vocab_size: int, validation_fraction: float
) -> tuple[TokenStream, TokenStream]:
    """Split a token file into training and validation streams at the start of a document.

    The validation part is the last ``validation_fraction`` of the tokens, rounded to whole
    documents, and at least one document. Shuffle sorted text (by date, by source) before
    tokenizing it, or its end will not represent the whole.

    Raises:
        DataError: There are fewer than two documents.
    """
    whole = TokenStream(prefix, vocab_size=vocab_size)
    if whole.num_documents < 2:
        raise DataError(
            f"{prefix} is one document, which cannot be split into training and validation.\n"
            "  use a separate text for validation"
        )
    wanted = whole.num_tokens * (1 - validation_fraction)
    cut = nearest_document(wanted, whole.num_documents, start_of=whole._start_of)
    return (
        TokenStream(prefix, vocab_size=vocab_size, documents=slice(cut)),
        TokenStream(prefix, vocab_size=vocab_size, documents=slice(cut, None)),
    )


def nearest_document(wanted: float, num_documents: int, *, start_of: Callable[[int], int]) -> int:
    """Return the document that begins nearest to token ``wanted``, excluding the first one."""
    after = bisect_left(range(1, num_documents - 1), wanted, key=start_of) + 1
    return min(max(1, after - 1), after, key=lambda document: abs(start_of(document) - wanted))


def open_pair(prefix: Path, *, with_modes: bool = False) -> IndexedDataset:
    """Open ``prefix.bin``, ``prefix.idx`` with Megatron-Core's reader.

    Args:
        prefix: Path of the pair without its suffixes.
        with_modes: Whether the index has a mode for each sequence, as chat data does.

    Raises:
        DataError: A file is missing, empty, or not in this format.
    """
    for suffix in (".bin", ".idx"):
        path = Path(f"{prefix}{suffix}")
        if not path.exists():
            raise DataError(f"{path} does not exist: a token file is a pair {prefix}.bin and .idx")
        try:
            size = regular(path).stat().st_size
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        if not size:
            raise DataError(f"{path} is empty")
    if reason := _index_error(Path(f"{prefix}.idx"), with_modes):
        raise DataError(f"{prefix}.idx is not an index of a Megatron token file: {reason}")
    return IndexedDataset(str(prefix), multimodal=with_modes)


_INTEGER_CODES = {
    DType[name].value for name in ("uint8", "int8", "uint16", "int16", "int32", "int64")
}
# magic, version, code of the dtype, number of sequences, number of document ends.
_HEADER = struct.Struct("<9sQBQQ")


def _index_error(path: Path, with_modes: bool) -> str | None:
    """Return why an index is invalid, or None. Megatron-Core would only fail an assertion."""
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(b"MMIDIDX\0\0"):
        return "it does not begin with MMIDIDX"
    _, version, code, num_sequences, num_ends = _HEADER.unpack(header)
    if version != 1 or code not in _INTEGER_CODES:
        return f"version {version} with tokens of type code {code}"
    # Each sequence has a length (int32), a byte offset (int64) and, for chats, a mode (int8). Each
    # document has its end (int64).
    expected = _HEADER.size + (12 + with_modes) * num_sequences + 8 * num_ends
    if (size := path.stat().st_size) != expected:
        return f"it has {size} bytes, but its header requires {expected}"
    return None
