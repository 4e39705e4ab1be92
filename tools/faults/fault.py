"""One fault: hooks that the harness calls before, in and after a job.

The package has no hooks for tests. Ranks notify an observer of each stage that they enter
(``train``), and the harness, which starts the ranks itself, passes an observer that kills them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disks import Disk, ThinDisk

STEPS, INTERVAL = 10, 3
FAULT_STEP = 5
"""Step of the fault, between the checkpoints of steps 3 and 6."""
IN_THE_MIDDLE_SECONDS = 0.3
"""Seconds from the start of a stage to the fault, so that it does not occur between stages."""
BLOW_STEP = 4
"""Steps before a fault is injected from outside: one more than the first checkpoint."""
HANG_SECONDS = 20.0
"""``guard.hang_seconds`` of runs that hang: more than a step takes on a busy machine."""


def nothing(*_: object) -> Any:
    """Do nothing: the default of a fault's hooks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One row of the table."""

    name: str
    observe: Callable[[int, str, int], None] = nothing
    """Called with rank, stage and step on every rank as it enters a stage."""
    prepare: Callable[[Path], None] = nothing
    """Called with the run folder in the job's first process, before ranks are forked."""
    on_job: Callable[[int, Path], str | None] = nothing
    """Called with the job's process id and the run folder after `BLOW_STEP` steps; returns the
    message that the operator saw, if it is not in the job's log."""
    damage: Callable[[Path], None] = nothing
    """Called with the run folder of an interrupted job, before the next job starts."""
    before_restart: Callable[[Path], None] = nothing
    """Called with the run folder after the faulty job, before its restart."""
    changes: tuple[str, ...] = ()
    """Settings of the faulty job."""
    local_copies: bool = False
    """Whether each rank, also after the restart, keeps local copies in its `node_folder`."""
    disk: Callable[[Path], Disk | ThinDisk] | None = None
    """Makes the disk of the run folder."""
    resumes: bool = False
    """Whether the faulty job is the restart of an interrupted one."""
    environment: tuple[str, str] | None = None
    """Variable of rank 1, on its host, and its value."""
    on_hosts: bool = False
    """Whether each rank is on a host of its own, in a network between them."""
    ends_well: bool = False
    """Whether the faulty job exits with status 0: it takes all steps, or is asked to stop."""


def node_folder(run_dir: Path, rank: int) -> Path:
    """Return the folder that stands for the local disk of a rank's node."""
    return run_dir.with_name(f"{run_dir.name}-node{rank}")
