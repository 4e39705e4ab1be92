"""Refuse pipes, sockets and devices before they are opened: reading one may never end."""

from __future__ import annotations

import errno
import stat
from pathlib import Path

_KINDS = {
    stat.S_IFIFO: "a named pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def regular(path: Path) -> Path:
    """Return ``path``, which may be opened and read to its end.

    A folder is not refused here, because the system refuses to open it.

    Raises:
        OSError: ``path`` does not exist, or is a pipe, a socket or a device.
    """
    if kind := _KINDS.get(stat.S_IFMT(path.stat().st_mode)):
        raise OSError(errno.EINVAL, f"it is {kind}, not a regular file", str(path))
    return path


def regular_or_shell_pipe(path: Path) -> Path:
    """Return ``path`` as `regular` does; accept what a shell passes as ``<(command)`` too.

    Such a pipe has a writer, so reading it ends.
    """
    return path if Path("/dev/fd") in path.parents or path == Path("/dev/stdin") else regular(path)
