"""Faults of processes: killed, stopped, stuck, or out of memory."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from memory_groups import join
from torch.distributed.checkpoint import filesystem

from faults.fault import FAULT_STEP, HANG_SECONDS, IN_THE_MIDDLE_SECONDS, Fault
from megatron_moe.checkpoint import folder


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


def second_job(start: Callable[[Path], str]) -> Fault:
    """Start another job on the folder of a running one, which must not be affected."""
    return Fault(
        name="two jobs on one run.dir: the second",
        on_job=lambda _, run_dir: start(run_dir),
        ends_well=True,
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
