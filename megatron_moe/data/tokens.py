"""``data.path`` to a token file: whatever text the user has, tokenized once and kept.

The cache key covers the text file (path, size, time of change) and the tokenizer's files, so an
edit of either makes new tokens, and nothing else does. The files are written under another name
and renamed when they are whole: a job that is killed leaves no half file behind, and two jobs that
race write the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from megatron_moe.data.chat import ChatTokenizer, write_conversations
from megatron_moe.data.corpus import tokenize_files
from megatron_moe.data.documents import find_files
from megatron_moe.data.stream import TokenStream
from megatron_moe.data.tokenizer import check_vocabulary, load_tokenizer
from megatron_moe.errors import DataError


def prepare_tokens(
    path: Path, *, dense_folder: Path, vocab_size: int, cache_dir: Path, max_malformed: int = 0
) -> Path:
    """The prefix of a token file that holds what ``path`` says.

    Args:
        path: A text file (one document), a JSONL file (``{"text": ...}`` a line), a folder of
            such files, or the prefix of a Megatron ``.bin/.idx`` pair, which is used as it is.
        dense_folder: Where the tokenizer lies.
        vocab_size: Rows of the model's embedding; no id may reach it.
        cache_dir: Where token files of texts are kept; made when missing.
        max_malformed: Malformed lines that may be left out; ``prefix.json`` shows them.

    Returns:
        Path without suffix. Each document in it ends with the tokenizer's end-of-text id.

    Raises:
        DataError: No such file, no text in it, a malformed line, or ids out of the vocabulary.
    """
    prefix = _existing_prefix(path)
    if prefix is None:
        tokenizer = load_tokenizer(dense_folder, vocab_size=vocab_size)
        prefix = _cached(
            path,
            cache_dir,
            depends_on=f"{tokenizer.fingerprint} {max_malformed}",
            write=lambda unfinished: tokenize_files(
                [path], unfinished, tokenizer, max_malformed=max_malformed
            ),
        )
    TokenStream(prefix, vocab_size=vocab_size)
    return prefix


def prepare_conversations(
    path: Path, *, dense_folder: Path, vocab_size: int, cache_dir: Path, max_malformed: int = 0
) -> Path:
    """The prefix of a token file with the conversations of ``path``, for `ChatSamples`.

    Args:
        path: A JSONL file of conversations, or the prefix of a pair made from one before.
        dense_folder: Where the tokenizer and its chat template lie.
        vocab_size: Rows of the model's embedding; no id may reach it.
        cache_dir: Where token files are kept; made when missing.
        max_malformed: Broken conversations that may be left out; ``prefix.json`` lists them.

    Raises:
        DataError: No such file, no chat template, or too many broken conversations.
    """
    if prefix := _existing_prefix(path):
        return prefix
    if path.is_dir():
        raise DataError(f"{path} is a folder; conversations come from one JSONL file")
    tokenizer = ChatTokenizer(dense_folder)
    check_vocabulary(tokenizer.vocab_size, vocab_size, folder=dense_folder)
    return _cached(
        path,
        cache_dir,
        depends_on=f"chat {tokenizer.fingerprint} {max_malformed}",
        write=lambda unfinished: write_conversations(
            path, unfinished, tokenizer, max_malformed=max_malformed
        ),
    )


def _existing_prefix(path: Path) -> Path | None:
    """The prefix when ``path`` is a token file already, None when it is text."""
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    if any(Path(f"{prefix}{suffix}").exists() for suffix in (".bin", ".idx")):
        return prefix
    if not path.exists():
        raise DataError(
            f"there is no text at {path}, and no token file {path}.bin, {path}.idx.\n"
            "  name a text or JSONL file, a folder of them, or the prefix of a .bin/.idx pair"
        )
    return None


def _cached(
    path: Path, cache_dir: Path, *, depends_on: str, write: Callable[[Path], object]
) -> Path:
    """The prefix under which ``write`` has put the tokens of ``path``, now or in an earlier run."""
    files = [(file.resolve(), file.stat()) for file in find_files([path])]
    seen = [f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}" for file, stat in files]
    identity = "\0".join([*seen, depends_on])
    prefix = cache_dir / f"{path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    # The index is renamed last: where it lies, the pair is whole.
    if Path(f"{prefix}.idx").exists():
        return prefix
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".tokenizing-") as folder:
        unfinished = Path(folder) / "tokens"
        write(unfinished)
        for suffix in (".json", ".bin", ".idx"):
            os.replace(f"{unfinished}{suffix}", f"{prefix}{suffix}")
    return prefix
