"""Read the memory limit of this process's cgroup, and whether the kernel killed a process for it.

Containers, SLURM and systemd limit the memory of a job by a cgroup. A process that exceeds the
limit gets SIGKILL and cannot say why; the others can, because the kernel counts such kills.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_UNLIMITED = 2**60
"""Version 1 has no word for it: the limit is the largest multiple of a page instead."""


@dataclass(frozen=True, slots=True)
class _Files:
    """Names of a version's files."""

    limit: str
    peak: str
    kills: str


_VERSION_1 = _Files("memory.limit_in_bytes", "memory.max_usage_in_bytes", "memory.oom_control")
_VERSION_2 = _Files("memory.max", "memory.peak", "memory.events")


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """The smallest limit that applies to this process."""

    folder: Path
    """Folder of the cgroup that has the limit."""
    limit: int
    """Limit in bytes."""
    peak: int | None
    """Largest use of all processes of that cgroup together, in bytes; None if it is not known."""
    kills: int
    """Processes of this cgroup and of those above it that the kernel has killed for memory."""

    def killed_since(self, before: MemoryLimit | None) -> str | None:
        """Return in words that the kernel has killed a process since then, or None if it has not.

        Args:
            before: An earlier state of the same process.
        """
        if before is None or self.kills <= before.kills:
            return None
        used = "" if self.peak is None else f", and its processes have used {_mib(self.peak)}"
        return (
            f"the kernel killed a process of this host because of a memory limit: {self.folder} "
            f"allows {_mib(self.limit)}{used}"
        )


def memory_limit(root: Path = Path("/")) -> MemoryLimit | None:
    """Return the memory limit of this process, or None if there is none.

    Args:
        root: Folder that holds ``sys/fs/cgroup`` and ``proc``; another one in tests.
    """
    kills, limits = 0, []
    for folder, files in _groups(root):
        kills += _count(folder / files.kills)
        limit = _integer(folder / files.limit)
        if limit is not None and limit < _UNLIMITED:
            limits.append((limit, folder, _integer(folder / files.peak)))
    if not limits:
        return None
    limit, folder, peak = min(limits, key=lambda entry: entry[0])  # the nearest, if equal
    return MemoryLimit(folder, limit, peak, kills)


def _groups(root: Path) -> Iterator[tuple[Path, _Files]]:
    """Yield the folders of this process's cgroup and of those above it, and their files."""
    base = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        relative = Path(path.lstrip("/"))
        if "memory" in controllers.split(","):
            top, files = base / "memory", _VERSION_1
        elif not controllers:
            top, files = base, _VERSION_2
        else:
            continue
        for part in (relative, *relative.parents):
            yield top / part, files


def _integer(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None


def _count(path: Path) -> int:
    """Return the ``oom_kill`` of a file of names and numbers; 0 if there is none."""
    try:
        words = path.read_text().split()
        return int(words[words.index("oom_kill") + 1])
    except (OSError, ValueError, IndexError):
        return 0


def _mib(count: int) -> str:
    return f"{count / 2**20:.0f} MiB"
