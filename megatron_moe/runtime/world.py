"""Joining a job: from torchrun, from SLURM, or as local ranks that this process forks itself."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed import distributed_c10d

from megatron_moe import errors
from megatron_moe.errors import ConfigError, UserError
from megatron_moe.log import console, quiet_megatron
from megatron_moe.runtime import cpu
from megatron_moe.runtime.gpus import claim_gpu, gpu_of, visible_gpus

TIMEOUT = timedelta(hours=2)
"""How long a collective waits; the watch (guard.hang_seconds) speaks long before."""
PR_SET_PDEATHSIG = 1
PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
NOTICE_SECONDS = 15.0
"""How long local ranks may go on when one has failed, to say what they know and end."""
AGAIN = "  run the same command again to go on from the newest checkpoint"


@dataclass(frozen=True, slots=True)
class World:
    """This process's place in the job."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    address: str
    """Where the other ranks reach rank 0's machine."""
    reports: Path | None = None
    """Folder where local ranks leave what went wrong, for the process that started them."""

    def last_words(self, error: UserError) -> None:
        """Tell the operator why this rank ends, when it cannot raise any more."""
        if self.reports is not None:
            _report(self.reports, self.rank, error)
        else:
            print(f"rank {self.rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process was told to stand, before it joins."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    init_method: str

    @property
    def address(self) -> str:
        """Where the other ranks reach rank 0's machine."""
        if self.init_method.startswith("file:"):
            return "127.0.0.1"
        url = urlsplit(self.init_method)
        return url.hostname or os.environ["MASTER_ADDR"]


def resolve_device(
    wanted: Literal["auto", "cpu", "cuda"], *, ranks: int = 1
) -> Literal["cpu", "cuda"]:
    """Return the device that the run will use.

    Args:
        wanted: The setting. ``auto`` takes the CPU, and says so, where ranks outnumber GPUs.
        ranks: Ranks that this process will start on this machine; 1 where a launcher starts them.

    Raises:
        ConfigError: CUDA is wanted, and there is none, or not a GPU for each rank.
    """
    if wanted == "cpu":
        return "cpu"
    gpus = visible_gpus()
    if gpus >= ranks:
        return "cuda"
    if wanted == "cuda" and not gpus:
        raise ConfigError(
            "run.device (cuda) needs a CUDA device, and torch sees none.\n"
            "  set run.device=cpu to run the same training on CPU and gloo"
        )
    if wanted == "cuda":
        raise ConfigError(
            f"run.device (cuda) needs a GPU for every rank: torch sees {gpus} for --ranks {ranks}."
            f"\n  set --ranks {gpus}, or run.device=cpu to run the same training on CPU and gloo"
        )
    if gpus:
        console.print(f"run.device (auto) takes the CPU: {ranks} ranks do not fit on {gpus} GPU(s)")
    return "cpu"


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
def joined(
    place: Place, device: Literal["cpu", "cuda"], reports: Path | None = None
) -> Iterator[World]:
    """Join the job at ``place`` for the length of a ``with`` block."""
    quiet_megatron(place.rank)
    if device == "cuda":
        where = _take_gpu(place)
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
        # No device_id: with one, torch makes every subgroup's communicator at once (hundreds of
        # splits of the world), and all unbatched sends and receives of a pipeline group take turns
        # on one communicator. Without, each pair of stages gets its own at its first transfer.
    )
    if device == "cuda":
        # torch asks for the device_id that is left out on purpose; the current device is right.
        warnings.filterwarnings("ignore", r"barrier\(\): using the device under current context")
    try:
        if device == "cuda":
            uuid = str(torch.cuda.get_device_properties(where).uuid)
            claim_gpu(distributed_c10d._get_default_store(), rank=place.rank, uuid=uuid)
        yield World(place.rank, place.size, place.local_rank, where, place.address, reports)
    finally:
        dist.destroy_process_group()


def _take_gpu(place: Place) -> torch.device:
    """Make this rank's GPU the current device, before a communicator or an allocation needs one."""
    index = gpu_of(place.local_rank, gpus=torch.cuda.device_count())
    torch.cuda.set_device(index)
    if "OMP_NUM_THREADS" not in os.environ:  # ranks share the cores; host threads feed the GPU
        torch.set_num_threads(1)
    return torch.device("cuda", index)


def run_local_ranks(
    fn: Callable[[World], None], *, ranks: int, device: Literal["cpu", "cuda"]
) -> None:
    """Fork ``ranks`` processes on this machine, join them and run ``fn`` on each.

    Forking shares the interpreter and everything imported so far, so ranks start in a second.
    SIGTERM, SIGUSR1 and SIGUSR2 are passed on to the ranks; when this process is killed, they are.

    Raises:
        UserError: What a rank raised, once however many ranks raised it.
        Exception: The traceback of the first rank that failed otherwise; the others are ended.
    """
    if device == "cpu":
        cpu.install()  # once, here: the forked ranks inherit the imports
    context = mp.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [
            context.Process(target=_local_rank, args=(rank, fn, ranks, device, folder))
            for rank in range(ranks)
        ]
        try:
            with _passing_on_signals(processes):
                for process in processes:
                    process.start()
                _wait(processes)
            exit_codes = [process.exitcode for process in processes]
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                    process.join()
        problem = _problem(folder, exit_codes)
        if problem is not None:
            raise problem


@contextlib.contextmanager
def _passing_on_signals(processes: Sequence[BaseProcess]) -> Iterator[None]:
    """What is told to this process is told to the ranks."""

    def pass_on(number: int, _: object) -> None:
        for process in processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)

    before = {number: signal.signal(number, pass_on) for number in PASSED_ON}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(processes: Sequence[BaseProcess]) -> None:
    """Until all have ended; when one has failed, the others have a while to notice."""
    deadline = float("inf")
    while alive := [process for process in processes if process.is_alive()]:
        left = deadline - time.monotonic()
        if left < 0:
            return
        connection.wait([process.sentinel for process in alive], timeout=min(left, 1.0))
        if deadline == float("inf") and any(process.exitcode for process in processes):
            deadline = time.monotonic() + NOTICE_SECONDS


def _local_rank(
    rank: int,
    fn: Callable[[World], None],
    ranks: int,
    device: Literal["cpu", "cuda"],
    folder: Path,
) -> None:
    if sys.platform == "linux":  # a rank does not outlive the process that started it
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in PASSED_ON:  # until training listens; a rank that only starts may simply end
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who ends us
    place = Place(rank, ranks, rank, ranks, (folder / "rendezvous").as_uri())
    try:
        with joined(place, device, folder) as world:
            fn(world)
    except UserError as error:
        _report(folder, rank, error)
        sys.exit(1)
    except Exception:
        (folder / f"bug-{rank:05d}").write_text(traceback.format_exc())
        sys.exit(1)


def _report(folder: Path, rank: int, error: UserError) -> None:
    (folder / f"{type(error).__name__}-{rank:05d}").write_text(str(error))


def _problem(folder: Path, exit_codes: list[int | None]) -> Exception | None:
    """The error that says best what went wrong: a cause before what followed from it."""
    if not any(exit_codes):
        return None
    for kind in (errors.ConfigError, errors.CheckpointError, errors.DataError, errors.UserError):
        if told := _messages(folder, kind.__name__):
            return kind("\n".join(told))
    bugs = sorted(folder.glob("bug-*"))
    if bugs:
        return RuntimeError(f"rank {int(bugs[0].name[4:])} failed:\n\n{bugs[0].read_text()}")
    killed = [_end(rank, code) for rank, code in enumerate(exit_codes) if code not in (0, 1)]
    told = _messages(folder, "JobError")
    return errors.JobError("\n".join([*told, *killed, AGAIN]))


def _messages(folder: Path, kind: str) -> list[str]:
    """What ranks told in errors of this kind, each message once."""
    return list(dict.fromkeys(p.read_text() for p in sorted(folder.glob(f"{kind}-*"))))


def _end(rank: int, exit_code: int | None) -> str:
    if exit_code == -signal.SIGKILL:
        return f"rank {rank} was killed (SIGKILL): by hand, or by the system, out of memory"
    if exit_code is None:
        return f"rank {rank} did not end and was killed"
    if exit_code < 0:
        return f"rank {rank} ended by {signal.Signals(-exit_code).name}"
    return f"rank {rank} ended with exit code {exit_code}"
