"""The dense folder's tokenizer, reduced to what the data stage asks of it.

A Hugging Face ``tokenizer.json`` is read by transformers. A folder that has only a SentencePiece
``tokenizer.model`` is read by sentencepiece itself: transformers rebuilds the model from its
pieces without the normalizer, and loses the space that Llama 2 puts before the first word.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from sentencepiece import SentencePieceProcessor

from megatron_moe.errors import DataError

# Whatever can change an id. The fingerprint covers these files: tokens go stale with them.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class Tokenizer(Protocol):
    """Text to ids and back. Adds no special tokens of its own, and reads none out of the text."""

    eos_id: int
    """Id that ends a document."""

    vocab_size: int
    """Every id is below it: the largest id plus one, added tokens included."""

    fingerprint: str
    """Hash of the tokenizer's files: equal fingerprints give equal ids."""

    def encode(self, text: str) -> list[int]:
        """Ids of one text; ``</s>`` written in it is ordinary text, not the end of a document."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, on several threads where the tokenizer has them."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special tokens written out."""
        ...

    def bytes_by_id(self) -> NDArray[np.int64]:
        """Bytes of UTF-8 text that each id stands for; 0 for special tokens."""
        ...


def load_tokenizer(folder: Path, *, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of a dense model's folder, read offline and without running code of the folder.

    Args:
        folder: Hugging Face folder with ``tokenizer.json`` or a SentencePiece ``tokenizer.model``.
        vocab_size: Rows of the model's embedding; None skips the comparison.

    Raises:
        DataError: No tokenizer that can be read, no end-of-text token, or more ids than rows.
    """
    if (folder / "tokenizer.model").exists() and not (folder / "tokenizer.json").exists():
        tokenizer: Tokenizer = SentencePieceTokenizer(folder)
    else:
        tokenizer = HuggingFaceTokenizer(folder)
    if vocab_size is not None:
        check_vocabulary(tokenizer.vocab_size, vocab_size, folder=folder)
    return tokenizer


def check_vocabulary(ids: int, rows: int, *, folder: Path) -> None:
    """Refuse a tokenizer of ``ids`` ids for an embedding of ``rows`` rows, with a `DataError`."""
    if ids > rows:
        raise DataError(
            f"the tokenizer of {folder} has ids up to {ids - 1}, but the model's "
            f"vocab_size is {rows}: id {rows} has no row in the embedding.\n"
            "  take the tokenizer that the model was trained with, or resize the embedding first"
        )


class HuggingFaceTokenizer:
    """A fast tokenizer of transformers."""

    def __init__(self, folder: Path) -> None:
        tokenizer = _auto_tokenizer(folder)
        if tokenizer.eos_token_id is None:
            raise DataError(
                f"the tokenizer of {folder} names no eos_token, which ends each document.\n"
                "  set eos_token in tokenizer_config.json"
            )
        self.eos_id: int = tokenizer.eos_token_id
        self.vocab_size: int = max(tokenizer.get_vocab().values()) + 1
        self.fingerprint: str = fingerprint_of(folder)
        self._backend = tokenizer.backend_tokenizer
        self._backend.encode_special_tokens = True  # "</s>" in a document is text, not an end

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer.encode_batch`."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer.decode`."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def bytes_by_id(self) -> NDArray[np.int64]:
        """See `Tokenizer.bytes_by_id`."""
        byte_level = "ByteLevel" in str(self._backend.decoder)  # a letter of a piece is a byte
        sizes_V = np.zeros(self.vocab_size, dtype=np.int64)
        for piece, i in self._backend.get_vocab(with_added_tokens=False).items():
            sizes_V[i] = len(piece) if byte_level else _bytes_of_piece(piece)
        for i, token in self._backend.get_added_tokens_decoder().items():
            sizes_V[i] = 0 if token.special else len(token.content.encode())
        return sizes_V


class SentencePieceTokenizer:
    """A SentencePiece model, as Llama 1 and 2 were released."""

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.model"
        try:
            self._model = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise DataError(f"{path} is not a SentencePiece model: {error}") from error
        self.eos_id: int = self._model.eos_id()
        self.vocab_size: int = self._model.get_piece_size()
        self.fingerprint: str = fingerprint_of(folder)
        if self.eos_id < 0:
            raise DataError(f"{path} has no </s>, which ends each document")

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        return self._model.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer.encode_batch`."""
        return self._model.encode(list(texts))

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer.decode`."""
        return self._model.decode(list(ids))

    def bytes_by_id(self) -> NDArray[np.int64]:
        """See `Tokenizer.bytes_by_id`."""
        model = self._model
        said = [not (model.is_control(i) or model.is_unknown(i)) for i in range(self.vocab_size)]
        pieces = [model.id_to_piece(i) for i in range(self.vocab_size)]
        sizes = [_bytes_of_piece(p) if s else 0 for p, s in zip(pieces, said, strict=True)]
        return np.array(sizes, dtype=np.int64)


def _bytes_of_piece(piece: str) -> int:
    """Of a piece as SentencePiece writes it: U+2581 is a space, <0x0A> one byte.

    >>> [_bytes_of_piece(piece) for piece in ("\u2581the", "<0x0A>", "\u00e9")]
    [4, 1, 2]
    """
    return 1 if _BYTE.fullmatch(piece) else len(piece.replace("\u2581", " ").encode())


def _auto_tokenizer(folder: Path) -> Any:
    # Any: a stub of AutoTokenizer knows no fast tokenizer, and a slow one has no backend.
    if not (folder / "tokenizer.json").exists() and not (folder / "vocab.json").exists():
        raise DataError(
            f"{folder} has no tokenizer: no tokenizer.json, no tokenizer.model.\n"
            "  copy the tokenizer files of the dense model there"
        )
    from transformers import AutoTokenizer  # which takes a second: training needs none

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers and tokenizers raise bare Exception for bad files
        raise DataError(f"cannot read the tokenizer of {folder}: {error}") from error
    if not tokenizer.is_fast:
        raise DataError(
            f"the tokenizer of {folder} ({type(tokenizer).__name__}) runs in Python alone.\n"
            "  convert it to a tokenizer.json"
        )
    return tokenizer


def fingerprint_of(folder: Path) -> str:
    """Hash of the tokenizer's files in ``folder``, the chat template included."""
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        if (path := folder / name).exists():
            digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
