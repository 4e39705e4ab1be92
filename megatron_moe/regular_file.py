"""Say what is in the place of a file before it is opened: reading a pipe may never end."""

from __future__ import annotations

import errno
import stat
from pathlib import Path

_ENDLESS = {
    stat.S_IFIFO: "a named pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_KINDS = {stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", **_ENDLESS}


def regular(path: Path) -> Path:
    """Return ``path``, which may be opened and read to its end.

    A folder is not refused here, because the system refuses to open it.

    Raises:
        OSError: ``path`` does not exist, or is a pipe, a socket or a device.
    """
    if kind := _ENDLESS.get(stat.S_IFMT(path.stat().st_mode)):
        raise OSError(errno.EINVAL, f"it is {kind}, not a regular file", str(path))
    return path


def regular_or_shell_pipe(path: Path) -> Path:
    """Return ``path`` as `regular` does; accept what a shell passes as ``<(command)`` too.

    Such a pipe has a writer, so reading it ends.
    """
    return path if Path("/dev/fd") in path.parents or path == Path("/dev/stdin") else regular(path)


def obstacle(path: Path, *, folder: bool = False) -> str | None:
    """Return in words what is at ``path`` instead of a file; None if it is a file or missing.

    Reading a named pipe would block forever, and a link to nothing looks like a missing file.

    Args:
        path: A path, which may be a symbolic link.
        folder: Expect a folder instead of a file.
    """
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        missing = path.is_symlink()
        return f"a symbolic link to {path.readlink()}, which is not there" if missing else None
    except OSError as error:
        return f"not readable ({error.strerror})"
    expected = stat.S_IFDIR if folder else stat.S_IFREG
    return None if kind == expected else _KINDS.get(kind, "of an unknown kind")
