"""Faults between hosts: of the network, and of what a host sees of a shared folder."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from functools import partial
from pathlib import Path

from hosts import Hosts, own_mounts

from faults.fault import FAULT_STEP, HANG_SECONDS, Fault
from megatron_moe.checkpoint import folder


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

    how = f"is cut off for {seconds:g} s, and returns" if seconds else "is cut off"
    others = "" if len(hosts.names) == 2 else f" of {len(hosts.names)}"
    return Fault(
        name=f"a host{others} {how} in {stage}",
        observe=observe,
        changes=(f"guard.hang_seconds={30 if seconds else hang_seconds}",),
        on_hosts=True,
        ends_well=bool(seconds),
    )


def power_lost(hosts: Hosts, stage: str) -> Fault:
    """Let host 1 vanish when rank 1 enters a stage: no packet says that its process ended."""

    def observe(rank: int, this_stage: str, step: int) -> None:
        if (rank, this_stage, step) == (1, stage, FAULT_STEP):
            hosts.cut(1)
            os.kill(os.getpid(), signal.SIGKILL)

    return Fault(
        name=f"a host vanishes in {stage}",
        observe=observe,
        changes=(f"guard.hang_seconds={HANG_SECONDS}",),
        on_hosts=True,
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
