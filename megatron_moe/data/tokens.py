"""Turn ``data.path`` into a token file: tokenize the text once and cache the result.

The cache key covers the text file (path, size, modification time) and the tokenizer's files, so
that an edit of either, and nothing else, makes new tokens. The files are written under a temporary
name and renamed when complete: a killed job leaves finished parts for the next one, and two
concurrent jobs write the same bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from megatron_moe.data.chat import ChatTokenizer, write_conversations
from megatron_moe.data.corpus import TAKE_ALL, do_nothing, tokenize_files
from megatron_moe.data.encode import Rules
from megatron_moe.data.files import find_files
from megatron_moe.data.stream import TokenStream
from megatron_moe.data.tokenizer import check_vocabulary, load_tokenizer
from megatron_moe.errors import DataError
from megatron_moe.hf.disk import fsync, make_folder, naming


def prepare_tokens(
    path: Path,
    *,
    dense_folder: Path,
    vocab_size: int,
    cache_dir: Path,
    max_malformed: int = 0,
    rules: Rules = TAKE_ALL,
    on_progress: Callable[[], None] = do_nothing,
) -> Path:
    """Return the prefix of a token file with the text of ``path``, tokenizing it if needed.

    Args:
        path: A text file (one document), a JSONL file (``{"text": ...}`` per line), a folder of
            such files, or the prefix of a Megatron ``.bin/.idx`` pair, which is used unchanged.
        dense_folder: Folder with the tokenizer.
        vocab_size: Rows of the model's embedding; all ids must be smaller.
        cache_dir: Folder for token files; created if missing.
        max_malformed: Maximum number of malformed lines to skip; ``prefix.json`` lists them.
        rules: Key of the text, and filters.
        on_progress: Called after every block of text.

    Returns:
        Path without suffix. Each document in it ends with the tokenizer's end-of-text id.

    Raises:
        DataError: The file does not exist, has no text or a malformed line, or an id is out of
            the vocabulary.
    """
    prefix = _existing_prefix(path)
    if prefix is None:
        tokenizer = load_tokenizer(dense_folder, vocab_size=vocab_size)
        prefix = _cached(
            path,
            cache_dir,
            depends_on=f"{tokenizer.fingerprint} {max_malformed} {rules}",
            write=lambda unfinished: tokenize_files(
                [path],
                unfinished,
                tokenizer,
                rules=rules,
                max_malformed=max_malformed,
                on_progress=on_progress,
            ),
        )
    TokenStream(prefix, vocab_size=vocab_size)
    return prefix


def prepare_conversations(
    path: Path,
    *,
    dense_folder: Path,
    vocab_size: int,
    cache_dir: Path,
    max_malformed: int = 0,
    on_progress: Callable[[], None] = do_nothing,
) -> Path:
    """Return the prefix of a token file with the conversations of ``path``, for `ChatSamples`.

    Args:
        path: A JSONL file of conversations, a folder of such files, or the prefix of a pair that
            was made from one earlier.
        dense_folder: Folder with the tokenizer and its chat template.
        vocab_size: Rows of the model's embedding; all ids must be smaller.
        cache_dir: Folder for token files; created if missing.
        max_malformed: Maximum number of malformed conversations to skip; ``prefix.json`` lists
            them.
        on_progress: Called after every conversation.

    Raises:
        DataError: The file or the chat template is missing, or too many conversations are
            malformed.
    """
    if prefix := _existing_prefix(path):
        return prefix
    tokenizer = ChatTokenizer(dense_folder)
    check_vocabulary(tokenizer.needed_rows, vocab_size, folder=dense_folder)
    tokenizer.rows = vocab_size
    return _cached(
        path,
        cache_dir,
        depends_on=f"chat {tokenizer.fingerprint} {max_malformed}",
        write=lambda unfinished: write_conversations(
            path, unfinished, tokenizer, max_malformed=max_malformed, on_progress=on_progress
        ),
    )


def _existing_prefix(path: Path) -> Path | None:
    """Return the prefix if ``path`` already is a token file, or None if it is text."""
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    if any(Path(f"{prefix}{suffix}").exists() for suffix in (".bin", ".idx")):
        return prefix
    if not path.exists():
        raise DataError(
            f"{path} does not exist, and neither does a token file {path}.bin, {path}.idx.\n"
            "  use a text or JSONL file, a folder of them, or the prefix of a .bin/.idx pair"
        )
    return None


def _cached(
    path: Path, cache_dir: Path, *, depends_on: str, write: Callable[[Path], object]
) -> Path:
    """Return the prefix of the cached tokens of ``path``; call ``write`` if there are none."""
    files = [(file.resolve(), file.stat()) for file in find_files([path])]
    versions = [f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}" for file, stat in files]
    identity = "\0".join([*versions, depends_on])
    prefix = cache_dir / f"{path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    # The index is renamed last: if it exists, the pair is complete.
    if Path(f"{prefix}.idx").exists():
        return prefix
    with naming(prefix), _own_folder(cache_dir, prefix.name) as folder:
        unfinished = folder / "tokens"
        if Path(f"{prefix}.idx").exists():  # another job finished while this one opened its folder
            return prefix
        if not Path(f"{unfinished}.json").exists():  # the last file that ``write`` writes
            Path(f"{unfinished}.idx").unlink(missing_ok=True)
            write(unfinished)
        for suffix in (".json", ".bin", ".idx"):
            fsync(Path(f"{unfinished}{suffix}"))
            os.replace(f"{unfinished}{suffix}", f"{prefix}{suffix}")
    return prefix


@contextlib.contextmanager
def _own_folder(cache_dir: Path, name: str) -> Iterator[Path]:
    """Yield a folder to tokenize in, which a killed job leaves behind and the next one continues.

    A second job that tokenizes the same text at the same time gets a temporary folder instead.
    """
    make_folder(cache_dir, "the folder for tokens")
    path = cache_dir / f".tokenizing-{name}.lock"
    lock = _take_lock(path)
    if lock is None:
        with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".tokens-") as temporary:
            yield Path(temporary)
        return
    folder = path.with_suffix("")
    with lock:
        folder.mkdir(exist_ok=True)
        try:
            yield folder
        except DataError:  # the text must change first, so nothing can be continued
            _remove(folder, path)
            raise
        _remove(folder, path)


def _take_lock(path: Path) -> IO[str] | None:
    """Return a file at ``path`` that this job has locked, or None if another job holds it."""
    while True:
        lock = path.open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # held, or the file system has no locks
            lock.close()
            return None
        # The last holder may have removed the file after it was opened: that lock is worth nothing.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                return lock
        lock.close()


def _remove(folder: Path, lock: Path) -> None:
    """Remove a job's folder, then its lock, after which another job may make both again."""
    shutil.rmtree(folder)
    lock.unlink()
