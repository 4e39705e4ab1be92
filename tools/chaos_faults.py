"""What goes wrong, and where: the faults of ``make chaos``, done to a training job from outside.

The package has no hook that exists for tests: ranks tell an observer which stage they enter
(``train``), and the harness, which starts the ranks itself, passes one that kills.
"""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import filesystem

from megatron_moe.checkpoint import folder

STEPS, INTERVAL = 10, 3
FAULT_STEP = 5
"""Between the checkpoints of steps 3 and 6."""
IN_THE_MIDDLE_SECONDS = 0.3
"""From the beginning of a stage to the blow, so that it does not fall between two stages."""
BLOW_STEP = 4
"""Steps that are taken before a fault comes from outside: one more than the first checkpoint."""
HANG_SECONDS = 4.0
"""``guard.hang_seconds`` of the runs that stand still."""


def nothing(*_: object) -> Any:
    """What most faults do at most places."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One row of the table."""

    name: str
    observe: Callable[[int, str, int], None] = nothing
    """Called with rank, stage and step on every rank as it enters a stage."""
    prepare: Callable[[Path], None] = nothing
    """Called with the run folder in the job's first process, before ranks are forked."""
    on_job: Callable[[int, Path], str | None] = nothing
    """Called with the job's process id and the run folder once `BLOW_STEP` steps are taken;
    returns what the operator saw, where that is not in the job's log."""
    damage: Callable[[Path], None] = nothing
    """Done to the folder of a job that ended well and has steps to go, before the next starts."""
    changes: tuple[str, ...] = ()
    """Settings of the faulty job."""
    disk_bytes: int | None = None
    """Size of the disk that the run folder lies on."""
    ends_well: bool = False
    """Whether the faulty job takes all steps, or exits 0 because it was told to end."""


def kill(rank: int, stage: str, step: int = FAULT_STEP) -> Fault:
    """SIGKILL to one rank in the middle of a stage."""
    return Fault(
        name=f"kill -9 of rank {rank} in {stage}",
        observe=partial(_kill_self, rank, stage, step),
    )


def _kill_self(rank: int, stage: str, step: int, here: int, entered: str, at: int) -> None:
    if (here, entered, at) == (rank, stage, step):
        time.sleep(IN_THE_MIDDLE_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)


def kill_half_written(rank: int, *, async_save: bool) -> Fault:
    """SIGKILL to one rank when half of its part of the second checkpoint is written."""
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
    """SIGKILL to rank 0 when all is written and only the name is missing."""

    def prepare(run_dir: Path) -> None:
        publish = folder.publish

        def killing(partial_folder: Path, final: Path) -> None:
            if folder.newest(run_dir) is not None:
                os.kill(os.getpid(), signal.SIGKILL)
            publish(partial_folder, final)

        folder.publish = killing

    return Fault(name="kill -9 of rank 0 before the checkpoint has its name", prepare=prepare)


def kill_job() -> Fault:
    """SIGKILL to the process that started the ranks."""
    return Fault(
        name="kill -9 of the process that started the ranks",
        on_job=lambda pid, _: os.kill(pid, signal.SIGKILL),
    )


def told(number: signal.Signals) -> Fault:
    """A signal that asks to save and end."""
    return Fault(name=number.name, on_job=lambda pid, _: os.kill(pid, number), ends_well=True)


def stopped(rank: int) -> Fault:
    """A process that is there and does nothing any more."""

    def observe(here: int, entered: str, at: int) -> None:
        if (here, entered, at) == (rank, "forward", FAULT_STEP):
            time.sleep(IN_THE_MIDDLE_SECONDS)
            os.kill(os.getpid(), signal.SIGSTOP)

    return Fault(
        name=f"SIGSTOP of rank {rank} in forward",
        observe=observe,
        changes=(f"guard.hang_seconds={HANG_SECONDS}",),
    )


def hanging(rank: int) -> Fault:
    """A rank that waits for something that never comes, while the others wait for it."""

    def observe(here: int, entered: str, at: int) -> None:
        if (here, entered, at) == (rank, "data", FAULT_STEP):
            time.sleep(3600)

    return Fault(
        name=f"rank {rank} hangs in data",
        observe=observe,
        changes=(f"guard.hang_seconds={HANG_SECONDS}",),
    )


def disk_full(disk_bytes: int, *, room_is_made: Callable[[Path], None] | None) -> Fault:
    """A disk with room for one checkpoint and a half."""
    if room_is_made is None:
        name, then = "disk full from the second checkpoint on", nothing
    else:
        name, then = "disk full, room is made before the last save", room_is_made

    def on_job(_: int, run_dir: Path) -> None:
        if then is not nothing:
            time.sleep(6)
            then(run_dir)

    return Fault(
        name=name,
        on_job=on_job,
        changes=("guard.save_retry_seconds=20",),
        disk_bytes=disk_bytes,
        ends_well=room_is_made is not None,
    )


def truncated_shard() -> Fault:
    """A file of the newest checkpoint that lost its second half."""

    def damage(run_dir: Path) -> None:
        newest = folder.newest(run_dir)
        assert newest is not None
        shard = sorted(newest.glob("*.distcp"))[0]
        os.truncate(shard, shard.stat().st_size // 2)

    return Fault(name="newest checkpoint: a shard cut in half", damage=damage)


def corrupted_index() -> Fault:
    """An index of the newest checkpoint with a run of other bytes in it."""

    def damage(run_dir: Path) -> None:
        newest = folder.newest(run_dir)
        assert newest is not None
        index = bytearray((newest / ".metadata").read_bytes())
        middle = len(index) // 2
        index[middle : middle + 64] = os.urandom(64)
        (newest / ".metadata").write_bytes(bytes(index))

    return Fault(name="newest checkpoint: its index corrupted", damage=damage)


def index_that_names_code() -> Fault:
    """An index that would run a command if it were unpickled."""

    def damage(run_dir: Path) -> None:
        newest = folder.newest(run_dir)
        assert newest is not None
        (newest / ".metadata").write_bytes(pickle.dumps(_Command(run_dir)))

    return Fault(name="newest checkpoint: its index names code", damage=damage)


class _Command:
    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.run_dir}/executed",)


def second_job(start: Callable[[Path], str]) -> Fault:
    """Another job on the folder of one that runs, which must not notice it."""
    return Fault(
        name="two jobs on one run.dir: the second",
        on_job=lambda _, run_dir: start(run_dir),
        ends_well=True,
    )
