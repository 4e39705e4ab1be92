"""Load the dense model's tokenizer, with the interface that this package needs.

transformers reads a Hugging Face ``tokenizer.json``. sentencepiece itself reads a folder that has
only a SentencePiece ``tokenizer.model``: transformers rebuilds the model from its pieces without
the normalizer, and loses the space that Llama 2 adds before the first word.
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
from megatron_moe.regular_file import regular

# Files that can change an id. The fingerprint covers them: cached tokens depend on all of these.
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
    """Convert text to ids and back, without adding or recognizing special tokens."""

    eos_id: int
    """Id that ends a document."""

    bos_id: int | None
    """Id that may begin a document; None if the tokenizer has none."""

    vocab_size: int
    """Largest id plus one, including added tokens."""

    needed_rows: int
    """Smallest number of rows of an embedding that has one for every id but those of added tokens,
    which few texts contain."""

    rows: int | None
    """Rows of the model's embedding; None if unknown."""

    fingerprint: str
    """Hash of the tokenizer's files: equal fingerprints give equal ids."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text; ``</s>`` in it is ordinary text, not an end of document."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many texts, on several threads if the tokenizer supports it."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``, including special tokens."""
        ...

    def bytes_by_id(self) -> NDArray[np.int64]:
        """Return the number of UTF-8 bytes that each id encodes, 0 for special tokens."""
        ...


def check_tokenizer_files(folder: Path) -> None:
    """Refuse pipes, sockets and devices among the tokenizer's files, which libraries would open.

    Raises:
        DataError: A file is one of these.
    """
    for path in (folder / name for name in TOKENIZER_FILES):
        try:
            if path.exists():
                regular(path)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error


def load_tokenizer(folder: Path, *, vocab_size: int | None = None) -> Tokenizer:
    """Load the tokenizer of a dense model's folder, offline and without running code from it.

    Args:
        folder: Hugging Face folder with ``tokenizer.json`` or a SentencePiece ``tokenizer.model``.
        vocab_size: Rows of the model's embedding; None skips the check.

    Raises:
        DataError: No readable tokenizer, no end-of-text token, or more ids than rows.
    """
    check_tokenizer_files(folder)
    if (folder / "tokenizer.model").exists() and not (folder / "tokenizer.json").exists():
        tokenizer: Tokenizer = SentencePieceTokenizer(folder)
    else:
        tokenizer = HuggingFaceTokenizer(folder)
    if vocab_size is not None:
        check_vocabulary(tokenizer.needed_rows, vocab_size, folder=folder)
        tokenizer.rows = vocab_size
    return tokenizer


def check_vocabulary(ids: int, rows: int, *, folder: Path) -> None:
    """Raise `DataError` if a tokenizer has more ``ids`` than the embedding has ``rows``."""
    if ids > rows:
        raise DataError(
            f"the tokenizer of {folder} has ids up to {ids - 1}, but the model's "
            f"vocab_size is {rows}: id {rows} has no row in the embedding.\n"
            "  use the tokenizer that the model was trained with, or resize the embedding first"
        )


class HuggingFaceTokenizer:
    """Fast tokenizer of transformers."""

    rows: int | None = None

    def __init__(self, folder: Path) -> None:
        tokenizer = auto_tokenizer(folder)
        if tokenizer.eos_token_id is None:
            raise DataError(
                f"the tokenizer of {folder} has no eos_token, which ends each document.\n"
                "  set eos_token in tokenizer_config.json"
            )
        self.eos_id: int = tokenizer.eos_token_id
        self.bos_id: int | None = tokenizer.bos_token_id
        self.fingerprint: str = fingerprint_of(folder)
        self._backend = backend_of(folder, tokenizer)
        self._backend.encode_special_tokens = True  # treat "</s>" in a document as plain text
        self.vocab_size: int = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        added = self._backend.get_added_tokens_decoder()
        pieces = self._backend.get_vocab(with_added_tokens=False).values()
        used = [i for i in pieces if i not in added or not added[i].special]
        self.needed_rows: int = max(self.eos_id, *used) + 1

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
        byte_level = "ByteLevel" in str(self._backend.decoder)  # one character per byte
        sizes_V = np.zeros(self.vocab_size, dtype=np.int64)
        for piece, i in self._backend.get_vocab(with_added_tokens=False).items():
            sizes_V[i] = len(piece) if byte_level else _bytes_of_piece(piece)
        for i, token in self._backend.get_added_tokens_decoder().items():
            sizes_V[i] = 0 if token.special else len(token.content.encode())
        return sizes_V


class SentencePieceTokenizer:
    """SentencePiece model, as released with Llama 1 and 2."""

    rows: int | None = None

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.model"
        try:
            self._model = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise DataError(f"{path} is not a SentencePiece model: {error}") from error
        self.eos_id: int = self._model.eos_id()
        self.bos_id: int | None = self._model.bos_id() if self._model.bos_id() >= 0 else None
        self.vocab_size: int = self._model.get_piece_size()
        self.needed_rows: int = self.vocab_size
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
        special = [model.is_control(i) or model.is_unknown(i) for i in range(self.vocab_size)]
        pieces = [model.id_to_piece(i) for i in range(self.vocab_size)]
        sizes = [0 if s else _bytes_of_piece(p) for p, s in zip(pieces, special, strict=True)]
        return np.array(sizes, dtype=np.int64)


def _bytes_of_piece(piece: str) -> int:
    """Return the bytes of a SentencePiece piece: U+2581 is a space, <0x0A> is one byte.

    >>> [_bytes_of_piece(piece) for piece in ("\u2581the", "<0x0A>", "\u00e9")]
    [4, 1, 2]
    """
    return 1 if _BYTE.fullmatch(piece) else len(piece.replace("\u2581", " ").encode())


def auto_tokenizer(folder: Path) -> Any:
    """Return the tokenizer as transformers reads it, offline and without code of the folder.

    Raises:
        DataError: The folder has no tokenizer that transformers can read, or a slow one.
    """
    check_tokenizer_files(folder)
    # Any: the type annotations of AutoTokenizer do not cover fast tokenizers and their backend.
    if not (folder / "tokenizer.json").exists() and not (folder / "vocab.json").exists():
        raise DataError(
            f"{folder} has no tokenizer: no tokenizer.json, no tokenizer.model.\n"
            "  copy the tokenizer files of the dense model into the folder"
        )
    from transformers import AutoTokenizer  # imported here: it takes a second

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers and tokenizers raise bare Exception for bad files
        raise DataError(f"cannot read the tokenizer of {folder}: {error}") from error
    if not tokenizer.is_fast:
        raise DataError(
            f"the tokenizer of {folder} ({type(tokenizer).__name__}) is a slow Python tokenizer.\n"
            "  convert it to a tokenizer.json"
        )
    return tokenizer


def backend_of(folder: Path, tokenizer: Any) -> Any:
    """Return the tokenizer of the library tokenizers, as ``tokenizer.json`` states it.

    transformers 5 rebuilds the normalizer and the pre-tokenizer of some classes, such as
    LlamaTokenizer, from rules of its own, which gives other ids for leading spaces. Truncation and
    padding belong to whoever saved the file, not to the text.

    Args:
        folder: Folder of the tokenizer.
        tokenizer: The same as transformers reads it, for a folder without ``tokenizer.json``.
    """
    path = folder / "tokenizer.json"
    if path.exists():
        from tokenizers import Tokenizer as FileTokenizer

        try:
            backend: Any = FileTokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise DataError(f"cannot read {path}: {error}") from error
    else:
        backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend


def check_same_vocabulary(first: Path, others: Sequence[Path]) -> None:
    """Check that models whose weights are combined number their tokens alike.

    A folder without a tokenizer is not checked.

    Raises:
        DataError: Two tokenizers give the same id to different tokens; the message names one.
    """
    expected = _token_of_id(first)
    for folder in others:
        tokens = _token_of_id(folder)
        if different := sorted(i for i in expected if i in tokens and tokens[i] != expected[i]):
            i = different[0]
            raise DataError(
                f"{folder} (upcycle.mix_with) and {first} (source.path) have different tokenizers: "
                f"id {i} is {tokens[i]!r} and {expected[i]!r}, and {len(different) - 1} more "
                "differ, so averaged embeddings would mean nothing.\n"
                "  mix models that were trained from the same model"
            )


def _token_of_id(folder: Path) -> dict[int, str]:
    """Return the token of each id, empty if the folder has no tokenizer."""
    check_tokenizer_files(folder)
    if not ((folder / "tokenizer.json").exists() or (folder / "tokenizer.model").exists()):
        return {}
    if (path := folder / "tokenizer.json").exists():
        backend = backend_of(folder, None)
        return {i: token for token, i in backend.get_vocab(with_added_tokens=True).items()}
    model = SentencePieceProcessor(model_file=str(path.with_suffix(".model")))
    return {i: model.id_to_piece(i) for i in range(model.get_piece_size())}


def fingerprint_of(folder: Path) -> str:
    """Return a hash of the tokenizer's files in ``folder``, including the chat template."""
    check_tokenizer_files(folder)
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        if (path := folder / name).exists():
            digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
