"""What was written is on the disk. Needs no torch, so that what only reads a run does not wait."""

from __future__ import annotations

import os
from pathlib import Path


def fsync(path: Path) -> None:
    """Have a file or folder on the disk itself before this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
