"""Create folders and sync files to disk.

Imports no torch, so that commands that only read a run start fast.
"""

from __future__ import annotations

import os
from pathlib import Path

from megatron_moe.errors import ConfigError


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
