"""One job a run folder: a lock that its owner's death releases.

The lock is the system's (flock), held by rank 0's process. It ends with that process, however it
ends, so a dead job leaves nothing that must be removed; the file's text only says who to ask.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import torch.distributed as dist

from megatron_moe.errors import ConfigError
from megatron_moe.runtime.environment import user_name


@contextlib.contextmanager
def only_job(run_dir: Path) -> Iterator[None]:
    """Hold the run folder for this job; all ranks enter together.

    Raises:
        ConfigError: On every rank, when another job holds it; the owner is named.
    """
    told: list[str | None] = [None]
    with contextlib.ExitStack() as stack:
        if dist.get_rank() == 0:
            told = [_take(stack.enter_context((run_dir / "lock").open("a+")), run_dir)]
        dist.broadcast_object_list(told, src=0)
        if told[0] is not None:
            raise ConfigError(told[0])
        yield


def _take(file: TextIO, run_dir: Path) -> str | None:
    """Lock the file and write who we are, or say whose it is."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        return (
            f"run.dir ({run_dir}) belongs to a job that is running, {_owner(file.read())}: two "
            "jobs would overwrite each other's checkpoints.\n"
            "  end that job, wait for it, or set another run.dir"
        )
    except OSError as error:
        return (
            f"run.dir ({run_dir}) lies on a file system that gives no lock ({error}), so two jobs "
            "could overwrite each other's checkpoints unnoticed.\n"
            "  set a run.dir on a file system with flock (on Lustre: mounted with -o flock)"
        )
    file.truncate(0)
    file.write(json.dumps(_me()) + "\n")
    file.flush()
    return None


def _me() -> dict[str, str | int | None]:
    return {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "user": user_name(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _owner(text: str) -> str:
    try:
        owner = json.loads(text)
        job = f", SLURM job {owner['slurm_job']}" if owner["slurm_job"] else ""
        return (
            f"process {owner['process']} of {owner['user']} on {owner['host']}{job}, "
            f"since {owner['since']}"
        )
    except (ValueError, KeyError):
        return "which has not said yet who it is"
