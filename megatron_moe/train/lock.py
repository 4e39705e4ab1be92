"""Allow one job per run folder, with a lock that is released when its owner exits.

Rank 0's process holds a system lock (flock). The system releases it when that process ends, however
it ends, so a dead job leaves nothing to clean up. The text in the file only identifies the owner.
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
from megatron_moe.train.run_folder import misplaced


@contextlib.contextmanager
def only_job(run_dir: Path) -> Iterator[None]:
    """Lock the run folder for this job; all ranks must enter together.

    Raises:
        ConfigError: On every rank, if another job holds the lock, or if something else is in the
            place of a file or folder of the run.
    """
    problem: list[str | None] = [None]
    with contextlib.ExitStack() as stack:
        if dist.get_rank() == 0:
            problem = [misplaced(run_dir)]
            if problem[0] is None:
                problem = [_lock(stack.enter_context((run_dir / "lock").open("a+")), run_dir)]
        dist.broadcast_object_list(problem, src=0)
        if problem[0] is not None:
            raise ConfigError(problem[0])
        yield


def _lock(file: TextIO, run_dir: Path) -> str | None:
    """Lock the file and write this job's identity into it; return the problem if that fails."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        return (
            f"run.dir ({run_dir}) is in use by a running job, {_owner(file.read())}: two jobs "
            "would overwrite each other's checkpoints.\n"
            "  stop that job, wait for it to end, or set another run.dir"
        )
    except OSError as error:
        return (
            f"run.dir ({run_dir}) must be on a file system that supports locks ({error}): without "
            "one, two jobs could overwrite each other's checkpoints.\n"
            "  set a run.dir on a file system with flock (on Lustre: mounted with -o flock)"
        )
    file.truncate(0)
    file.write(json.dumps(_identity()) + "\n")
    file.flush()
    return None


def _identity() -> dict[str, str | int | None]:
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
        return "which has not identified itself yet"
