"""Create folders, write files durably and atomically, and say why a disk refuses a write.

Imports no torch, so that commands that only read a run start fast.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_moe.errors import ConfigError

_REASONS = {
    errno.ENOSPC: "no space left",
    errno.EDQUOT: "the quota is used up",
    errno.EROFS: "the file system is mounted read-only",
    errno.EIO: "the device reports an input/output error",
    errno.ESTALE: "the file server no longer knows this folder",
    errno.EACCES: "this user may not write there",
}


def make_folder(path: Path, setting: str) -> None:
    """Create a folder that is to be written to, unless it exists.

    Raises:
        ConfigError: It cannot be created or written to; the message names ``setting``.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(path, os.W_OK | os.X_OK) else "this user may not write to it"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason is not None:
        raise ConfigError(
            f"{setting} ({path}) must be a folder that can be created and written to: {reason}.\n"
            "  choose another one"
        )


def fsync(path: Path) -> None:
    """Flush a file or folder to disk before returning."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path`` for a file that becomes ``path``.

    At the end of the ``with`` block the file is flushed to disk and renamed, so that a reader sees
    the old file or the new one, even after a power failure. On an error it is removed, and ``path``
    stays as it was. The folder is made if it is missing.
    """
    make_folder(path.parent, f"the folder of {path.name}")
    staged = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    try:
        yield staged
        fsync(staged)
        staged.replace(path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 as described in `replacing`."""
    with replacing(path) as staged:
        staged.write_text(text, encoding="utf-8")


def refusal(error: OSError, folder: Path, *, needed: int | None = None) -> str:
    """Return in words why a write below ``folder`` failed.

    Args:
        error: What the write raised.
        folder: Folder that was written to.
        needed: Number of bytes that were to be written, if known.
    """
    path = error.filename or folder
    reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
    if error.errno != errno.ENOSPC:
        return f"{reason} ({path})"
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    asked = "" if needed is None else f"{_size(needed)} needed, "
    return f"{reason} on the disk of {folder}: {asked}{_size(free)} free"


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
