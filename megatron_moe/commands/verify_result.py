"""Result of verifying one folder, and the progress of reading."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Seen = Callable[[int, int], None]
"""Called with the bytes read so far and their total."""
VALUES_ONLY = "no checksums: headers and sizes only, and that all values are finite"


@dataclass(slots=True)
class Verified:
    """Result for one folder."""

    folder: Path
    kind: str
    """``checkpoint``, ``model`` (an export or a source), ``plan``, ``plan of a run``, ``latest of a
    run``, or ``source of a run``."""
    compared_with: str
    """Origin of the expected contents, in words."""
    files: int = 0
    """Number of files that were checked."""
    num_bytes: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Remarks on what was not checked, or what a resume does; not damage."""

    def summary(self) -> str:
        """Return the result in one line, without its problems."""
        without_checksums = self.compared_with == VALUES_ONLY
        state = "no damage found" if without_checksums else "intact"
        count = "1 file" if self.files == 1 else f"{self.files} files"
        how = self.compared_with if without_checksums else f"compared with {self.compared_with}"
        return (
            f"{self.folder}: {'damaged' if self.problems else state} "
            f"({count}, {self.num_bytes / 2**20:,.1f} MiB; {how})"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the result for scripts."""
        return {
            "folder": str(self.folder),
            "kind": self.kind,
            "compared_with": self.compared_with,
            "files": self.files,
            "bytes": self.num_bytes,
            "problems": self.problems,
            "notes": self.notes,
        }


@dataclass(slots=True)
class Counter:
    """Bytes read so far."""

    seen: Seen
    total: int
    done: int = 0

    def add(self, count: int) -> None:
        """Show that more bytes were read."""
        self.done += count
        self.seen(min(self.done, self.total), self.total)


def size_of(path: Path) -> int | None:
    """Return the size of a file in bytes; None if there is none, or its name is too long."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None
