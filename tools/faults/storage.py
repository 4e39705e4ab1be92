"""Faults of the disk of a run folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from disks import Disk, ThinDisk

from faults.fault import Fault, node_folder
from faults.processes import kill


def disk_full(size: Callable[[], int], *, room_is_made: bool) -> Fault:
    """Use a disk with room for one and a half checkpoints."""
    name = "disk full, room is made before the last save"

    def on_job(_: int, run_dir: Path) -> None:
        if room_is_made:
            time.sleep(6)
            Disk(run_dir, size()).repair()

    return Fault(
        name=name if room_is_made else "disk full from the second checkpoint on",
        on_job=on_job,
        changes=("guard.save_retry_seconds=20",),
        disk=lambda path: Disk(path, size()),
        ends_well=room_is_made,
    )


def disk_spoiled(name: str, spoil: Callable[[Disk], None], *changes: str) -> Fault:
    """Do something to a disk with room for all, in the middle of the run."""
    return Fault(
        name=name,
        on_job=lambda _, run_dir: spoil(Disk(run_dir, 0)),
        changes=("guard.save_retry_seconds=10", *changes),
        disk=lambda path: Disk(path, 2**28),
    )


def disk_fails() -> Fault:
    """Let a disk fail: the kernel makes it read-only, for open files too."""
    return Fault(
        name="the disk fails and becomes read-only",
        on_job=lambda _, run_dir: ThinDisk(run_dir, 0).fail(),
        changes=("guard.save_retry_seconds=10",),
        disk=lambda path: ThinDisk(path, 2**28),
    )


def fsync_fails(size: Callable[[], int]) -> Fault:
    """Use a disk whose storage has room for one and a half checkpoints, but which promises more."""
    return Fault(
        name="fsync fails: the storage is smaller than its disk",
        changes=("guard.save_retry_seconds=10",),
        disk=lambda path: ThinDisk(path, size()),
    )


def local_disk_lost(rank: int) -> Fault:
    """Kill a rank and remove its local copies: its neighbor has others."""
    return Fault(
        name=f"rank {rank} and the local disk of its node are lost",
        observe=kill(rank, "forward").observe,
        before_restart=lambda run_dir: shutil.rmtree(node_folder(run_dir, rank)),
        local_copies=True,
    )
