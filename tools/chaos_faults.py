"""Define the faults that ``make chaos`` injects into training jobs.

The package has no hooks for tests. Ranks notify an observer of each stage that they enter
(``train``), and the harness, which starts the ranks itself, passes an observer that kills them.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from disks import Disk, ThinDisk
from hosts import Hosts, own_mounts
from memory_groups import join
from torch.distributed.checkpoint import filesystem

from megatron_moe.checkpoint import folder

STEPS, INTERVAL = 10, 3
FAULT_STEP = 5
"""Step of the fault, between the checkpoints of steps 3 and 6."""
IN_THE_MIDDLE_SECONDS = 0.3
"""Seconds from the start of a stage to the fault, so that it does not occur between stages."""
BLOW_STEP = 4
"""Steps before a fault is injected from outside: one more than the first checkpoint."""
HANG_SECONDS = 8.0
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
    changes: tuple[str, ...] = ()
    """Settings of the faulty job."""
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


def kill(rank: int, stage: str, step: int = FAULT_STEP) -> Fault:
    """Send SIGKILL to one rank in the middle of a stage."""
    return Fault(
        name=f"kill -9 of rank {rank} in {stage}",
        observe=partial(_kill_self, rank, stage, step),
    )


def _kill_self(
    rank: int, stage: str, step: int, this_rank: int, this_stage: str, this_step: int
) -> None:
    if (this_rank, this_stage, this_step) == (rank, stage, step):
        time.sleep(IN_THE_MIDDLE_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)


def kill_half_written(rank: int, *, async_save: bool) -> Fault:
    """Send SIGKILL to one rank when half of its part of the second checkpoint is written."""
    how = "async save" if async_save else "save"
    return Fault(
        name=f"kill -9 of rank {rank}, half of its file written ({how})",
        prepare=partial(_kill_in_write, rank),
        changes=(f"checkpoint.async_save={str(async_save).lower()}",),
    )


def _kill_in_write(rank: int, run_dir: Path) -> None:
    write, written = filesystem._write_item, []

    def counting(*args: Any, **kwargs: Any) -> Any:
        if folder.newest(run_dir) is not None and dist.get_rank() == rank:
            written.append(1)
            if len(written) == 20:
                time.sleep(IN_THE_MIDDLE_SECONDS)
                os.kill(os.getpid(), signal.SIGKILL)
        return write(*args, **kwargs)

    filesystem._write_item = counting


def kill_before_name() -> Fault:
    """Send SIGKILL to rank 0 when the checkpoint is written but not yet renamed."""

    def prepare(run_dir: Path) -> None:
        publish = folder.publish

        def killing(partial_folder: Path, final: Path) -> None:
            if folder.newest(run_dir) is not None:
                os.kill(os.getpid(), signal.SIGKILL)
            publish(partial_folder, final)

        folder.publish = killing

    return Fault(name="kill -9 of rank 0 before the checkpoint has its name", prepare=prepare)


def kill_job() -> Fault:
    """Send SIGKILL to the process that started the ranks."""
    return Fault(
        name="kill -9 of the process that started the ranks",
        on_job=lambda pid, _: os.kill(pid, signal.SIGKILL),
    )


def signaled(number: signal.Signals) -> Fault:
    """Send a signal that asks the job to save and stop."""
    return Fault(name=number.name, on_job=lambda pid, _: os.kill(pid, number), ends_well=True)


def stopped(rank: int) -> Fault:
    """Suspend a rank's process."""

    def observe(this_rank: int, stage: str, step: int) -> None:
        if (this_rank, stage, step) == (rank, "forward", FAULT_STEP):
            time.sleep(IN_THE_MIDDLE_SECONDS)
            os.kill(os.getpid(), signal.SIGSTOP)

    return Fault(
        name=f"SIGSTOP of rank {rank} in forward",
        observe=observe,
        changes=(f"guard.hang_seconds={HANG_SECONDS}",),
    )


def hanging(rank: int) -> Fault:
    """Make a rank hang while the others wait for it."""

    def observe(this_rank: int, stage: str, step: int) -> None:
        if (this_rank, stage, step) == (rank, "data", FAULT_STEP):
            time.sleep(3600)

    return Fault(
        name=f"rank {rank} hangs in data",
        observe=observe,
        changes=(f"guard.hang_seconds={HANG_SECONDS}",),
    )


def cut_off(
    hosts: Hosts,
    stage: str,
    step: int = FAULT_STEP,
    *,
    seconds: float = 0,
    hang_seconds: float = HANG_SECONDS,
) -> Fault:
    """Cut host 1 off when rank 1 enters a stage, for good or for some seconds."""

    def observe(rank: int, this_stage: str, this_step: int) -> None:
        if (rank, this_stage, this_step) != (1, stage, step):
            return
        hosts.cut(1)
        if seconds:
            threading.Timer(seconds, partial(hosts.cut, 1, off=False)).start()

    how = f"is cut off for {seconds:g} s, and returns" if seconds else "vanishes"
    others = "" if len(hosts.names) == 2 else f" of {len(hosts.names)}"
    return Fault(
        name=f"a host{others} {how} in {stage}",
        observe=observe,
        changes=(f"guard.hang_seconds={30 if seconds else hang_seconds}",),
        on_hosts=True,
        ends_well=bool(seconds),
    )


def slow_network(hosts: Hosts, delay: float, loss: float) -> Fault:
    """Delay and lose packets between the hosts for the second half of the job."""
    return Fault(
        name=f"every packet between hosts takes {1000 * delay:.0f} ms, {loss:.0%} are lost",
        on_job=lambda _pid, _run_dir: hosts.slow_down(delay, loss),
        on_hosts=True,
        ends_well=True,
    )


def folder_fails_on_a_host() -> Fault:
    """Make the run folder read-only on host 1, as a file server does that has lost a client."""

    def observe(rank: int, stage: str, step: int) -> None:
        if (rank, stage, step) == (1, "data", FAULT_STEP):
            own_mounts()
            here = folder_of_this_job()
            subprocess.run(["mount", "--bind", here, here], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", here], check=True)

    return Fault(
        name="the shared folder becomes read-only on one host",
        observe=observe,
        prepare=_RUN_DIRS.append,
        changes=("guard.save_retry_seconds=10",),
        on_hosts=True,
    )


_RUN_DIRS: list[Path] = []


def folder_of_this_job() -> str:
    """Return the run folder that `Fault.prepare` was called with."""
    return str(_RUN_DIRS[-1])


def flipped_gradient(rank: int) -> Fault:
    """Flip a bit of a gradient in a step that is computed twice, before its last backward pass."""

    def prepare(_: Path) -> None:
        from megatron_moe.commands import pretraining

        step = pretraining.train_step

        def damaging(state: Any, batches: Any, *args: Any, at: Any, **kwargs: Any) -> Any:
            if dist.get_rank() == rank and state.step + 1 == FAULT_STEP:
                at = _flipping(state, at, 2 * len(batches))
            return step(state, batches, *args, at=at, **kwargs)

        pretraining.train_step = damaging

    return Fault(
        name=f"rank {rank} computes a wrong gradient once",
        prepare=prepare,
        changes=(f"guard.device_check_interval={FAULT_STEP}",),
    )


def _flipping(state: Any, at: Callable[[str], None], when: int) -> Callable[[str], None]:
    passes: list[str] = []

    def flip(stage: str) -> None:
        at(stage)
        if stage == "backward":
            passes.append(stage)
            if len(passes) == when:
                bits = state.wrapped[0].buffers[0].grad_data.view(torch.int32)
                bits[int(bits.abs().argmax())] ^= 1 << 26

    return flip


def disk_full(size: int, *, room_is_made: bool) -> Fault:
    """Use a disk with room for one and a half checkpoints."""
    name = "disk full, room is made before the last save"

    def on_job(_: int, run_dir: Path) -> None:
        if room_is_made:
            time.sleep(6)
            Disk(run_dir, size).repair()

    return Fault(
        name=name if room_is_made else "disk full from the second checkpoint on",
        on_job=on_job,
        changes=("guard.save_retry_seconds=20",),
        disk=lambda path: Disk(path, size),
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


def fsync_fails(size: int) -> Fault:
    """Use a disk whose storage has room for one and a half checkpoints, but which promises more."""
    return Fault(
        name="fsync fails: the storage is smaller than its disk",
        changes=("guard.save_retry_seconds=10",),
        disk=lambda path: ThinDisk(path, size),
    )


def out_of_memory(group: Path, rank: int) -> Fault:
    """Let a rank take memory until the kernel kills it for the limit of a cgroup."""

    def observe(this_rank: int, stage: str, step: int) -> None:
        if (this_rank, stage, step) == (rank, "forward", FAULT_STEP):
            held = []
            while True:
                held.append(bytearray(os.urandom(2**20)) * 32)
                time.sleep(0.05)

    return Fault(
        name=f"rank {rank} exceeds the memory limit of a cgroup",
        observe=observe,
        prepare=lambda _: join(group),
    )


def unknown_name() -> Fault:
    """Give a host a MASTER_ADDR that it cannot resolve."""
    return Fault(
        name="a host cannot resolve MASTER_ADDR",
        environment=("MASTER_ADDR", "no-such-host.invalid"),
        on_hosts=True,
    )


def late_files(seconds: float) -> Fault:
    """Hide the files of the newest checkpoint on host 1, as a file server's cache does."""

    def observe(rank: int, stage: str, step: int) -> None:
        if (rank, stage, step) != (1, "load", 0) or _HIDDEN:
            return
        own_mounts()
        hidden = folder.newest(_RUN_DIRS[-1])
        _HIDDEN.append(hidden)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(hidden)], check=True)
        show = ["umount", "-l", str(hidden)]
        threading.Timer(seconds, partial(subprocess.run, show, check=True)).start()

    return Fault(
        name=f"a host sees the newest checkpoint {seconds:g} s late",
        observe=observe,
        prepare=_RUN_DIRS.append,
        on_hosts=True,
        resumes=True,
        ends_well=True,
    )


_HIDDEN: list[Path | None] = []


def truncated_shard() -> Fault:
    """Truncate a file of the newest checkpoint to half its size."""

    def damage(run_dir: Path) -> None:
        newest = folder.newest(run_dir)
        assert newest is not None
        shard = sorted(newest.glob("*.distcp"))[0]
        os.truncate(shard, shard.stat().st_size // 2)

    return Fault(name="newest checkpoint: a shard cut in half", damage=damage)


def flipped_bit(name: str) -> Fault:
    """Flip one bit in the middle of a file of the newest checkpoint."""

    def damage(run_dir: Path) -> None:
        newest = folder.newest(run_dir)
        assert newest is not None
        content = bytearray((newest / name).read_bytes())
        content[len(content) // 2] ^= 1
        (newest / name).write_bytes(content)

    return Fault(name=f"newest checkpoint: a bit flipped in {name}", damage=damage)


def corrupted_index() -> Fault:
    """Overwrite 64 bytes of the newest checkpoint's index."""

    def damage(run_dir: Path) -> None:
        newest = folder.newest(run_dir)
        assert newest is not None
        index = bytearray((newest / ".metadata").read_bytes())
        middle = len(index) // 2
        index[middle : middle + 64] = os.urandom(64)
        (newest / ".metadata").write_bytes(bytes(index))

    return Fault(name="newest checkpoint: its index corrupted", damage=damage)


def index_that_names_code() -> Fault:
    """Replace the index by one that would run a command if it were unpickled.

    Without checksums: whoever writes such an index can write its checksum too.
    """

    def damage(run_dir: Path) -> None:
        newest = folder.newest(run_dir)
        assert newest is not None
        (newest / ".metadata").write_bytes(pickle.dumps(_Command(run_dir)))
        (newest / "CHECKSUMS").unlink()

    return Fault(name="newest checkpoint: its index names code", damage=damage)


class _Command:
    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.run_dir}/executed",)


def second_job(start: Callable[[Path], str]) -> Fault:
    """Start another job on the folder of a running one, which must not be affected."""
    return Fault(
        name="two jobs on one run.dir: the second",
        on_job=lambda _, run_dir: start(run_dir),
        ends_well=True,
    )
