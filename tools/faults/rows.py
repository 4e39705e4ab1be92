"""The rows of the table of docs/reliability.md, in order."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import disks
from attacks import ATTACKS
from disks import Disk
from hosts import Hosts

from faults import checkpoints, devices, network, processes, storage, strangers
from faults.fault import FAULT_STEP, Fault

MANY_HANG_SECONDS = 30.0
"""``guard.hang_seconds`` of the job on many hosts, which share the cores of one."""
FILE_SYSTEM_BYTES = 2 * 2**20
"""Storage that an empty ext4 takes, and some room for logs."""
STAGES = ("forward", "backward", "optimizer", "save")


def of_processes(ranks: int) -> list[Fault]:
    """Return the faults of processes: each rank is killed in each stage, and some are stopped."""
    return [
        *(processes.kill(rank, "load", 0) for rank in range(ranks)),
        *(
            processes.kill(rank, name, 6 if name == "save" else FAULT_STEP)
            for name in STAGES
            for rank in range(ranks)
        ),
        *(
            processes.kill_half_written(rank, async_save=async_save)
            for async_save in (False, True)
            for rank in range(ranks)
        ),
        processes.kill_before_name(),
        processes.kill_job(),
        processes.signaled(signal.SIGTERM),
        processes.signaled(signal.SIGUSR1),
        processes.stopped(1),
        processes.stopped(0),
        processes.hanging(1),
    ]


def of_files(start: Callable[[Path], str]) -> list[Fault]:
    """Return the faults of checkpoints, run folders, ports and numbers.

    Args:
        start: Starts another job on a run folder, and returns what its operator saw.
    """
    return [
        checkpoints.truncated_shard(),
        checkpoints.flipped_bit("__1_0.distcp"),
        checkpoints.flipped_bit("checkpoint.json"),
        checkpoints.flipped_bit("source/config.json"),
        checkpoints.flipped_bit("config.yaml"),
        checkpoints.flipped_bit("CHECKSUMS"),
        checkpoints.corrupted_index(),
        checkpoints.index_that_names_code(),
        processes.second_job(start),
        storage.local_disk_lost(1),
        *(strangers.attacked(kind) for kind in ATTACKS),
        devices.flipped_gradient(1),
    ]


def of_hosts(hosts: Hosts) -> list[Fault]:
    """Return the faults between two hosts."""
    return [
        network.cut_off(hosts, "load", 0),
        network.cut_off(hosts, "forward"),
        network.cut_off(hosts, "save", 6),
        network.power_lost(hosts, "forward"),
        network.cut_off(hosts, "forward", seconds=3),
        network.slow_network(hosts, 0.2, 0.01),
        network.folder_fails_on_a_host(),
        network.late_files(5),
        network.unknown_name(),
    ]


def of_many_hosts(hosts: Hosts) -> list[Fault]:
    """Return the faults between more than two hosts."""
    return [network.cut_off(hosts, "forward", hang_seconds=MANY_HANG_SECONDS)]


def of_disks(checkpoint_bytes: Callable[[], int]) -> list[Fault]:
    """Return the faults of disks that have room for one and a half checkpoints, or that fail."""
    if disks.missing() is not None:
        return []

    def room() -> int:
        return checkpoint_bytes() * 3 // 2

    return [
        storage.disk_full(room, room_is_made=False),
        storage.disk_full(room, room_is_made=True),
        storage.disk_spoiled("no byte left, TensorBoard on", Disk.fill, "log.tensorboard=true"),
        storage.disk_spoiled("no inodes left", Disk.take_inodes),
        storage.disk_fails(),
        storage.fsync_fails(lambda: room() + FILE_SYSTEM_BYTES),
    ]


def of_memory(group: Path | None) -> list[Fault]:
    """Return the fault of a rank that exceeds the limit of a cgroup, if one can be made."""
    return [] if group is None else [processes.out_of_memory(group, 1)]
