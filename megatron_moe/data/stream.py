"""The tokens of a Megatron ``.bin/.idx`` pair, as one long row of documents.

Shape letters: ``T`` tokens.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset
from numpy.typing import NDArray

from megatron_moe.errors import DataError

Tokens = NDArray[np.int64]

# A token file of another tokenizer shows in almost any place one looks; every place is looked at
# again when it is read. Scanning terabytes before the first step would cost more than it tells.
_PROBES = 64
_PROBE_TOKENS = 4096


class TokenStream:
    """All documents of a token file, one after the other, read by position from a memory map."""

    def __init__(self, prefix: Path, *, vocab_size: int, documents: slice = slice(None)) -> None:
        """Open the pair ``prefix.bin``, ``prefix.idx``.

        Args:
            prefix: Path of the pair without its suffixes.
            vocab_size: Rows of the model's embedding; ids must be below.
            documents: The consecutive documents that make up the stream.

        Raises:
            DataError: A file is missing, truncated or no token file, or holds ids out of range.
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
        """Tokens ``[start, start + count)`` of the stream, ``(count,)``.

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
        """Where documents begin in ``[start, start + count)``, counted from ``start``."""
        begin = self._first_token + start
        place = bisect_left(self._documents, begin, key=self._start_of)
        starts = []
        for document in self._documents[place:]:
            if (found := self._start_of(document) - begin) >= count:
                break
            starts.append(found)
        return starts

    def _start_of(self, document: int) -> int:
        """Token at which ``document`` begins; for the one after the last, the end of the file."""
        sequence = int(self._dataset.document_indices[document])
        if sequence == len(self._dataset):
            return self._tokens_in_file()
        return int(self._dataset.index.sequence_pointers[sequence]) // self._itemsize

    def _tokens_in_file(self) -> int:
        return int(self._dataset.sequence_lengths.sum(dtype=np.int64))

    def _check_size(self) -> None:
        expected = self._tokens_in_file() * self._itemsize
        found = Path(f"{self.prefix}.bin").stat().st_size
        if found != expected:
            raise DataError(
                f"{self.prefix}.bin has {found} bytes, but its index promises {expected}: "
                f"{self._tokens_in_file()} tokens.\n  the copy was cut short, or the two files do "
                "not belong together"
            )


def check_ids(tokens_T: Tokens, *, prefix: Path, vocab_size: int) -> None:
    """Refuse ids that the model's embedding has no row for, with a `DataError`."""
    bad_T = tokens_T[(tokens_T < 0) | (tokens_T >= vocab_size)]
    if bad_T.size:
        raise DataError(
            f"{prefix}.bin holds id {bad_T[0]}, but the model's vocab_size is {vocab_size}.\n"
            "  these tokens were made with another tokenizer: tokenize the text again"
        )


def split_documents(
    prefix: Path, *, vocab_size: int, validation_fraction: float
) -> tuple[TokenStream, TokenStream]:
    """A token file in two, for training and validation, cut where a document begins.

    The validation part is the last ``validation_fraction`` of the tokens, as near as documents
    allow, and at least one of them. Text that is sorted (by date, by source) should be shuffled
    before it is tokenized, or the end will not speak for the whole.

    Raises:
        DataError: There are not two documents.
    """
    whole = TokenStream(prefix, vocab_size=vocab_size)
    if whole.num_documents < 2:
        raise DataError(
            f"{prefix} is one document, which cannot be split into training and validation.\n"
            "  give validation a text of its own"
        )
    wanted = whole.num_tokens * (1 - validation_fraction)
    cut = nearest_document(wanted, whole.num_documents, start_of=whole._start_of)
    return (
        TokenStream(prefix, vocab_size=vocab_size, documents=slice(cut)),
        TokenStream(prefix, vocab_size=vocab_size, documents=slice(cut, None)),
    )


def nearest_document(wanted: float, num_documents: int, *, start_of: Callable[[int], int]) -> int:
    """The document, neither the first nor beyond the last, that begins nearest to ``wanted``."""
    after = bisect_left(range(1, num_documents - 1), wanted, key=start_of) + 1
    return min(max(1, after - 1), after, key=lambda document: abs(start_of(document) - wanted))


def open_pair(prefix: Path, *, with_modes: bool = False) -> IndexedDataset:
    """Megatron-Core's reader of ``prefix.bin``, ``prefix.idx``.

    Args:
        prefix: Path of the pair without its suffixes.
        with_modes: Whether the index holds a mode for each sequence, as that of chats does.

    Raises:
        DataError: A file is missing, empty, or not of this form.
    """
    for suffix in (".bin", ".idx"):
        path = Path(f"{prefix}{suffix}")
        if not path.exists():
            raise DataError(f"{path} does not exist: a token file is a pair {prefix}.bin and .idx")
        if not path.stat().st_size:
            raise DataError(f"{path} is empty")
    if reason := _why_no_index(Path(f"{prefix}.idx"), with_modes):
        raise DataError(f"{prefix}.idx is not an index of Megatron's token files: {reason}")
    return IndexedDataset(str(prefix), multimodal=with_modes)


_INTEGER_CODES = {
    DType[name].value for name in ("uint8", "int8", "uint16", "int16", "int32", "int64")
}
# magic, version, code of the dtype, number of sequences, number of document ends.
_HEADER = struct.Struct("<9sQBQQ")


def _why_no_index(path: Path, with_modes: bool) -> str | None:
    """What is wrong with an index, which Megatron-Core would tell by an assertion, or None."""
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(b"MMIDIDX\0\0"):
        return "it does not begin with MMIDIDX"
    _, version, code, num_sequences, num_ends = _HEADER.unpack(header)
    if version != 1 or code not in _INTEGER_CODES:
        return f"version {version} with tokens of type code {code}"
    # Per sequence a length (int32), a byte offset (int64) and, in chats, a mode (int8); per
    # document its end (int64).
    expected = _HEADER.size + (12 + with_modes) * num_sequences + 8 * num_ends
    if (found := path.stat().st_size) != expected:
        return f"it has {found} bytes, but its header promises {expected}"
    return None
