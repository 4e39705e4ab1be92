"""Count the CPU cores that this process may use: affinity and cgroup limits included."""

from __future__ import annotations

import os
from pathlib import Path


def available_cores(root: Path = Path("/")) -> int:
    """Return the number of cores, at least 1.

    Containers and schedulers limit a process in two ways: by a set of cores (affinity), and by a
    share of time (a cgroup's quota), which ``os.cpu_count`` ignores.

    Args:
        root: Folder that holds ``sys/fs/cgroup`` and ``proc``; another one in tests.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limits = [limit for limit in _quotas(root) if limit is not None]
    return max(1, int(min([cores or 1, *limits])))


def threads_per_rank(local_ranks: int) -> int | None:
    """Return the threads that one of ``local_ranks`` should use; None keeps OMP_NUM_THREADS."""
    if "OMP_NUM_THREADS" in os.environ:
        return None
    return max(1, available_cores() // local_ranks)


def _quotas(root: Path) -> list[float | None]:
    """Return the quotas in cores of this process's cgroup and of those above it."""
    base = root / "sys/fs/cgroup"
    result = [_version_1(base / "cpu"), _version_2(base)]
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return result
    for line in lines:
        if line.startswith("0::/"):
            relative = Path(line[len("0::/") :])
            result += [_version_2(base / part) for part in (relative, *relative.parents)]
    return result


def _version_2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _version_1(folder: Path) -> float | None:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        period = int((folder / "cpu.cfs_period_us").read_text())
        return None if quota < 0 else quota / period
    except (OSError, ValueError, ZeroDivisionError):
        return None
