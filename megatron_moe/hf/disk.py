"""Create folders, write files durably and atomically, and say why a disk refuses a write.

Imports no torch, so that commands that only read a run start fast.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_moe.errors import ConfigError, DiskError

_REASONS = {
    errno.ENOSPC: "no space left",
    errno.EDQUOT: "the quota is used up",
    errno.EROFS: "the file system is mounted read-only",
    errno.EIO: "the device reports an input/output error",
    errno.ESTALE: "the file server no longer knows this folder",
    errno.EACCES: "this user may not read or write there",
    errno.EISDIR: "a folder is in the place of a file",
    errno.ENOTDIR: "a file is in the place of a folder",
}
_WAYS_OUT = {
    errno.EACCES: "change its owner or its mode, or choose another folder",
    errno.EISDIR: "move it away, or choose another folder",
    errno.ENOTDIR: "move it away, or choose another folder",
}
"""Ways out of errors that come from a file's owner, mode or kind, and not from its disk."""


def make_folder(path: Path, setting: str) -> None:
    """Create a folder that is to be written to, unless it exists.

    Raises:
        ConfigError: It cannot be created or written to; the message names ``setting``.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(path, os.W_OK | os.X_OK) else _why_not(path)
    except OSError as error:
        reason = refusal(error, path)
    if reason is not None:
        raise ConfigError(
            f"{setting} ({path}) must be a folder that can be created and written to: {reason}.\n"
            "  choose another one"
        )


def _why_not(path: Path) -> str:
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        return _REASONS[errno.EROFS]
    return "this user may not write to it"


def fsync(path: Path) -> None:
    """Flush a file or folder to disk before returning."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the name of a file to errors of its disk that lack it, as those of a write do."""
    try:
        yield
    except Exception as error:
        failure = _disk_failure(error)
        if failure is None or failure.filename is not None:
            raise
        raise OSError(failure.errno, failure.strerror, str(path)) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path`` for a file that becomes ``path``.

    At the end of the ``with`` block the file is flushed to disk and renamed, so that a reader sees
    the old file or the new one, even after a power failure. On an error it is removed, and ``path``
    stays as it was. The folder is made if it is missing, and removed with the file.
    """
    made = not path.parent.exists()
    make_folder(path.parent, f"the folder of {path.name}")
    staged = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    try:
        with naming(path):
            staged.touch()
            permissions = stat.S_IMODE(staged.stat().st_mode)  # those of the umask
            yield staged
            staged.chmod(permissions)  # safetensors puts a file for the owner alone in its place
            fsync(staged)
            staged.replace(path)
    except BaseException:
        staged.unlink(missing_ok=True)
        if made:
            with suppress(OSError):  # another rank has a file there
                path.parent.rmdir()
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
    path = error.filename2 or error.filename or folder
    reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
    if error.errno != errno.ENOSPC:
        return f"{reason} ({path})"
    disk = os.statvfs(next(p for p in (folder, *folder.parents) if p.exists()))
    if disk.f_files and not disk.f_favail:
        return f"no inodes left on the disk of {folder}: it can hold no more files"
    free = disk.f_bavail * disk.f_frsize
    asked = "" if needed is None else f"{size_in_words(needed)} needed, "
    text = f"{reason} on the disk of {folder}: {asked}{size_in_words(free)} free"
    # Thin volumes and quotas refuse what the file system itself has room for.
    return text if needed is None or free < needed else f"{text}, but its storage has no more"


@contextmanager
def disk_errors_in_words(folder: Path) -> Iterator[None]:
    """Turn errors of a disk inside a ``with`` block into a `DiskError`.

    Args:
        folder: Folder whose free space is reported if the error names no file.

    Raises:
        DiskError: A disk is full, read-only, over its quota, or fails; or the user may not use a
            file, or a folder is in its place.
    """
    try:
        yield
    except Exception as error:
        failure = _disk_failure(error)
        if failure is None:
            raise
        folder = Path(failure.filename).parent if failure.filename else folder
        way_out = "free space or repair the disk, or choose another folder"
        way_out = _WAYS_OUT.get(failure.errno or 0, way_out)
        raise DiskError(
            f"{refusal(failure, folder)}.\n  {way_out}, and run the command again"
        ) from error


def _disk_failure(error: Exception) -> OSError | None:
    """Return the system's error behind an exception; safetensors has it in its message only."""
    if isinstance(error, OSError):
        named = error.filename is not None or error.errno not in _WAYS_OUT
        return error if error.errno in _REASONS and named else None
    match = re.search(r"\(os error (\d+)\)", str(error))
    number = int(match[1]) if match else 0
    return OSError(number, os.strerror(number)) if number in _REASONS else None


def size_in_words(count: int) -> str:
    """Return a number of bytes in MiB or GiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
