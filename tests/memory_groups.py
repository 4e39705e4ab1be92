"""A cgroup with a memory limit, of version 1 or 2, for processes that a test starts."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

_TOP = Path("/sys/fs/cgroup")


def missing() -> str | None:
    """Return why no memory can be limited here, or None."""
    return None if os.geteuid() == 0 and _memory() is not None else "needs root and memory cgroups"


def _memory() -> tuple[Path, str] | None:
    """Return the folder where cgroups with a memory limit are made, and the name of the limit."""
    if (_TOP / "memory" / "memory.limit_in_bytes").exists():
        return _TOP / "memory", "memory.limit_in_bytes"
    with contextlib.suppress(OSError):
        if "memory" in (_TOP / "cgroup.subtree_control").read_text().split():
            return _TOP, "memory.max"
    return None


@contextlib.contextmanager
def limited_memory(limit: int) -> Iterator[Path]:
    """Yield the folder of a new cgroup, which a process joins through its ``cgroup.procs``."""
    memory = _memory()
    assert memory is not None
    top, name = memory
    folder = top / f"megatron-moe-{os.getpid()}-{time.monotonic_ns()}"
    folder.mkdir()
    try:
        (folder / name).write_text(str(limit))
        yield folder
    finally:
        for _ in range(100):  # a process that has ended leaves a moment later
            with contextlib.suppress(OSError):
                folder.rmdir()
                break
            time.sleep(0.1)


def join(folder: Path) -> None:
    """Move this process, and what it starts, to a cgroup."""
    (folder / "cgroup.procs").write_text(str(os.getpid()))
