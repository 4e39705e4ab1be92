"""Sync files to disk, and say in words why a disk refuses a write.

Imports no torch, so that commands that only read a run start fast.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

_REASONS = {
    errno.ENOSPC: "no space left",
    errno.EDQUOT: "the quota is used up",
    errno.EROFS: "the file system is mounted read-only",
    errno.EIO: "the device reports an input/output error",
    errno.ESTALE: "the file server no longer knows this folder",
    errno.EACCES: "this user may not write there",
}


def fsync(path: Path) -> None:
    """Flush a file or folder to disk before returning."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
