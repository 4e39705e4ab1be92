"""Joining a job: from torchrun, from SLURM, or as local ranks that this process forks itself."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_moe import errors
from megatron_moe.device import cpu
from megatron_moe.errors import ConfigError, UserError

TIMEOUT = timedelta(minutes=10)
"""How long a collective waits for a rank that does not come."""


@dataclass(frozen=True, slots=True)
class World:
    """This process's place in the job."""

    rank: int
    size: int
    local_rank: int
    device: torch.device


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process was told to stand, before it joins."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    init_method: str


def resolve_device(wanted: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """The device that the run will use.

    Raises:
        ConfigError: CUDA is wanted and not there.
    """
    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise ConfigError(
            "run.device (cuda) needs a CUDA device, and torch sees none.\n"
            "  set run.device=cpu to run the same training on CPU and gloo"
        )
    return "cuda" if wanted != "cpu" and there else "cpu"


def place_from_environment() -> Place | None:
    """Where torchrun or SLURM put this process; None when it was started by hand."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:  # torchrun
        local_rank, local_size = int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_WORLD_SIZE", 1))
        return Place(int(env["RANK"]), int(env["WORLD_SIZE"]), local_rank, local_size, "env://")
    if "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", 1)) > 1:  # srun, a task per rank
        if "MASTER_ADDR" not in env:
            raise ConfigError(
                "SLURM started this job, but MASTER_ADDR is not set: it is where ranks meet.\n"
                "  export MASTER_ADDR=<first host of the job>, as launch/slurm.sbatch does"
            )
        address = f"tcp://{env['MASTER_ADDR']}:{env.get('MASTER_PORT', '29500')}"
        local_size = int(env.get("SLURM_NTASKS_PER_NODE", 1))
        local_rank = int(env["SLURM_LOCALID"])
        return Place(
            int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), local_rank, local_size, address
        )
    return None


@contextlib.contextmanager
def joined(place: Place, device: Literal["cpu", "cuda"]) -> Iterator[World]:
    """Join the job at ``place`` for the length of a ``with`` block."""
    if device == "cuda":
        torch.cuda.set_device(place.local_rank)
        where = torch.device("cuda", place.local_rank)
    else:
        cpu.install()
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // place.local_size))
        where = cpu.CPU
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=place.init_method,
        rank=place.rank,
        world_size=place.size,
        timeout=TIMEOUT,
        device_id=where if device == "cuda" else None,
    )
    try:
        yield World(place.rank, place.size, place.local_rank, where)
    finally:
        dist.destroy_process_group()


def run_local_ranks(
    fn: Callable[[World], None], *, ranks: int, device: Literal["cpu", "cuda"]
) -> None:
    """Fork ``ranks`` processes on this machine, join them and run ``fn`` on each.

    Forking shares the interpreter and everything imported so far, so ranks start in a second.

    Raises:
        UserError: What a rank raised, once however many ranks raised it.
        Exception: The traceback of the first rank that failed otherwise; the others are ended.
    """
    if device == "cpu":
        cpu.install()  # once, here: the forked ranks inherit the imports
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(
            _local_rank, (fn, ranks, device, folder), nprocs=ranks, join=False, start_method="fork"
        )
        assert context is not None
        try:
            while not context.join():
                pass
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            raise _told(Path(folder)) or _killed(error) or error from None
        except KeyboardInterrupt:
            for process in filter(None, context.processes):
                process.terminate()
            raise


def _local_rank(
    rank: int,
    fn: Callable[[World], None],
    ranks: int,
    device: Literal["cpu", "cuda"],
    folder: str,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who ends us
    place = Place(rank, ranks, rank, ranks, (Path(folder) / "rendezvous").as_uri())
    with joined(place, device) as world:
        try:
            fn(world)
        except UserError as error:
            (Path(folder) / f"error-{rank:05d}").write_text(f"{type(error).__name__}\n{error}")
            raise


def _killed(error: Exception) -> UserError | None:
    """A rank that another hand ended: the system for want of memory, or an operator."""
    if isinstance(error, mp.ProcessExitedException) and error.signal_name == "SIGKILL":
        return UserError(
            f"rank {error.error_index} was killed (SIGKILL): by the system, out of memory, or "
            "by hand.\n  run the same command again to go on from the newest checkpoint"
        )
    return None


def _told(folder: Path) -> UserError | None:
    """What the ranks told before they ended, each message once, in the class it was raised in."""
    reports = list(dict.fromkeys(path.read_text() for path in sorted(folder.glob("error-*"))))
    if not reports:
        return None
    kinds, messages = zip(*(report.split("\n", 1) for report in reports), strict=True)
    return getattr(errors, kinds[0])("\n".join(messages))
