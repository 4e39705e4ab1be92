"""Join a job: from torchrun, from SLURM, or as local ranks that this process forks."""

from __future__ import annotations

import contextlib
import ctypes
import gc
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

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed import distributed_c10d

from megatron_moe import errors
from megatron_moe.errors import ConfigError, JobError, UserError
from megatron_moe.log import console, quiet_megatron
from megatron_moe.runtime import cpu
from megatron_moe.runtime.cores import threads_per_rank
from megatron_moe.runtime.gpus import claim_gpu, gpu_of, visible_gpus
from megatron_moe.runtime.launchers import ELASTIC, RankPosition, wait_until_resolved
from megatron_moe.runtime.meeting import meet
from megatron_moe.runtime.memory_limit import memory_limit

TIMEOUT = timedelta(hours=2)
"""Timeout of a collective; the watch (guard.hang_seconds) ends a stuck job long before."""
PR_SET_PDEATHSIG = 1
FORWARDED_SIGNALS = (
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGINT,
    signal.SIGHUP,
)
RESUME = "run the same command to resume, unless the launcher restarts the job"
NOTICE_SECONDS = 15.0
"""Seconds that the other local ranks have to report and exit after one has failed."""


@dataclass(frozen=True, slots=True)
class World:
    """Position of this process in a job that it has joined."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    address: str
    """Address at which the other ranks reach rank 0."""
    reports: Path | None = None
    """Folder where local ranks write their errors, for the process that started them."""

    def report_error(self, error: UserError) -> None:
        """Report why this rank ends, for use when it cannot raise any more."""
        if self.reports is not None:
            _report(self.reports, self.rank, error)
        else:
            head = f"rank {self.rank}: {type(error).__name__}"
            print(f"{head}: {error}\n  {RESUME}", file=sys.stderr, flush=True)


def resolve_device(
    wanted: Literal["auto", "cpu", "cuda"], *, ranks: int = 1
) -> Literal["cpu", "cuda"]:
    """Return the device that the run will use.

    Args:
        wanted: The setting. ``auto`` uses the CPU if ranks outnumber GPUs, and logs that.
        ranks: Ranks that this process will start on this machine; 1 if a launcher starts them.

    Raises:
        ConfigError: CUDA is requested, but there is no GPU, or not one for each rank.
    """
    if wanted == "cpu":
        return "cpu"
    gpus = visible_gpus()
    if gpus >= ranks:
        return "cuda"
    if wanted == "cuda" and not gpus:
        raise ConfigError(
            "run.device (cuda) needs a CUDA device, but torch finds none.\n"
            "  set run.device=cpu to train on CPU with gloo"
        )
    if wanted == "cuda":
        raise ConfigError(
            f"run.device (cuda) needs a GPU for every rank, but torch finds {gpus} for --ranks "
            f"{ranks}.\n  set --ranks {gpus}, or run.device=cpu to train on CPU with gloo"
        )
    if gpus:
        console.print(
            f"Using the CPU (run.device=auto): {ranks} ranks need more than {gpus} GPU(s)"
        )
    return "cpu"


@contextlib.contextmanager
def joined(
    position: RankPosition, device: Literal["cpu", "cuda"], reports: Path | None = None
) -> Iterator[World]:
    """Join the job at ``position`` inside a ``with`` block."""
    quiet_megatron(position.rank)
    if reports is None and ELASTIC in os.environ and sys.platform == "linux":
        # If torchrun's agent is killed, the others restart without it, so this rank must not go on.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    wait_until_resolved(position)
    if device == "cuda":
        local_device = _select_gpu(position)
    else:
        cpu.install()
        if (threads := threads_per_rank(position.local_size)) is not None:
            torch.set_num_threads(threads)
        local_device = cpu.CPU
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=meet(position),
        rank=position.rank,
        world_size=position.size,
        timeout=TIMEOUT,
        # No device_id: with one, torch creates all subgroups' communicators eagerly (hundreds of
        # splits of the world), and all unbatched sends and receives of a pipeline group share one
        # communicator in turn. Without it, each pair of stages gets its own at its first transfer.
    )
    if device == "cuda":
        # torch warns that device_id is missing, which is intended; the current device is right.
        warnings.filterwarnings("ignore", r"barrier\(\): using the device under current context")
    lost = False
    try:
        if device == "cuda":
            uuid = str(torch.cuda.get_device_properties(local_device).uuid)
            claim_gpu(distributed_c10d._get_default_store(), rank=position.rank, uuid=uuid)
        yield World(
            position.rank,
            position.size,
            position.local_rank,
            local_device,
            position.address,
            reports,
        )
    except JobError:
        # A rank is lost. Destroying the groups that it belonged to can wait for it or crash, and
        # the operator must see the error first; the process is about to end.
        lost = True
        raise
    finally:
        if not lost:
            dist.destroy_process_group()


def _select_gpu(position: RankPosition) -> torch.device:
    """Make this rank's GPU the current device, before a communicator or an allocation needs one."""
    index = gpu_of(position.local_rank, gpus=torch.cuda.device_count())
    torch.cuda.set_device(index)
    if (
        "OMP_NUM_THREADS" not in os.environ
    ):  # ranks share the cores, and the host only launches kernels
        torch.set_num_threads(1)
    return torch.device("cuda", index)


def run_local_ranks(
    fn: Callable[[World], None], *, ranks: int, device: Literal["cpu", "cuda"]
) -> None:
    """Fork ``ranks`` processes on this machine, join them and run ``fn`` on each.

    Forking shares the interpreter and all imported modules, so ranks start within a second.
    SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 are forwarded to the ranks, and a second SIGINT
    kills them; if this process is killed, so are they.

    Raises:
        UserError: The error that ranks raised, once even if several ranks raised it.
        Exception: The traceback of the first rank that failed otherwise; the others are killed.
    """
    if device == "cpu":
        cpu.install()  # once, here, because forked ranks inherit the imports
    context, limit_before = mp.get_context("fork"), memory_limit()
    with _temporary_folder() as folder:
        processes = [
            context.Process(target=_local_rank, args=(rank, fn, ranks, device, folder))
            for rank in range(ranks)
        ]
        try:
            with _forwarded_signals(processes):
                gc.freeze()  # or each rank copies all imports, to search them for garbage
                for process in processes:
                    process.start()
                gc.unfreeze()  # or this process would keep its garbage for good
                _wait(processes)
            exit_codes = [process.exitcode for process in processes]
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                    process.join()
        limit = memory_limit()
        problem = _problem(folder, exit_codes, limit and limit.killed_since(limit_before))
        if problem is not None:
            raise problem


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    """Yield a folder for the rendezvous and the reports of local ranks."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="megatron-moe-", ignore_cleanup_errors=True)
    except OSError as error:
        raise ConfigError(
            f"no folder for temporary files can be written ({error}): local ranks meet in one.\n"
            "  set TMPDIR to a folder that this user may write to"
        ) from error
    with folder as name:
        yield Path(name)


@contextlib.contextmanager
def _forwarded_signals(processes: Sequence[BaseProcess]) -> Iterator[None]:
    """Forward signals of this process to the ranks inside a ``with`` block."""
    interrupts = 0

    def forward(number: int, _: object) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        if interrupts > 1:  # the first Ctrl-C lets training save, the second one ends at once
            number = signal.SIGKILL
        for process in processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)

    # A signal that is ignored stays so: nohup ignores SIGHUP, a shell SIGINT of background jobs.
    handled = [n for n in FORWARDED_SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, forward) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(processes: Sequence[BaseProcess]) -> None:
    """Wait until all processes have ended; after a failure, for at most ``NOTICE_SECONDS``."""
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
    if sys.platform == "linux":  # a rank must not outlive its parent
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        # gloo would listen at the address that the host's name has, for the whole network.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    for number in FORWARDED_SIGNALS:  # training handles them later; until then a rank may just end
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    position = RankPosition(rank, ranks, rank, ranks, f"file:{folder / 'rendezvous'}")
    try:
        with joined(position, device, folder) as world:
            fn(world)
    except UserError as error:
        _report(folder, rank, error)
        sys.exit(1)
    except Exception:
        _leave(folder, "bug", rank, traceback.format_exc())
        sys.exit(1)


def _report(folder: Path, rank: int, error: UserError) -> None:
    _leave(folder, type(error).__name__, rank, str(error))


def _leave(folder: Path, kind: str, rank: int, text: str) -> None:
    """Leave a text for the process that started this rank, or print it if the disk is full."""
    try:
        (folder / f"{kind}-{rank:05d}").write_text(text)
    except OSError as problem:
        print(f"rank {rank}: {kind}: {text}\n  ({problem})", file=sys.stderr, flush=True)


_CAUSES = (
    errors.ConfigError, errors.CheckpointError, errors.DataError, errors.DiskError,
    errors.UserError,
)  # fmt: skip


def _problem(
    folder: Path, exit_codes: list[int | None], out_of_memory: str | None
) -> Exception | None:
    """Return the error to raise, if any: causes take precedence over their consequences.

    Args:
        folder: Reports of the ranks.
        exit_codes: Their exit codes.
        out_of_memory: Why the kernel killed a process, if it did.
    """
    if not any(exit_codes):
        return None
    for kind in _CAUSES:
        if messages := _messages(folder, kind.__name__):
            return kind("\n".join(messages))
    bugs = [path for path in sorted(folder.glob("bug-*")) if path.stat().st_size]
    if bugs:
        return RuntimeError(f"rank {int(bugs[0].name[4:])} failed:\n\n{bugs[0].read_text()}")
    messages = _messages(folder, "JobError")
    if out_of_memory is not None and any(out_of_memory in message for message in messages):
        out_of_memory = "the reason is above"
    killed = [
        _exit_message(rank, code, out_of_memory)
        for rank, code in enumerate(exit_codes)
        if code not in (0, 1) or (code == 1 and not _left(folder, rank))
    ]
    return errors.JobError("\n".join([*messages, *killed]))


def _left(folder: Path, rank: int) -> bool:
    """Return whether a rank has left a text, which is empty if its disk was full."""
    return any(path.stat().st_size for path in folder.glob(f"*-{rank:05d}"))


def _messages(folder: Path, kind: str) -> list[str]:
    """Return the messages of the ranks' errors of this kind, without duplicates."""
    texts = [path.read_text() for path in sorted(folder.glob(f"{kind}-*"))]
    return list(dict.fromkeys(filter(None, texts)))


def _exit_message(rank: int, exit_code: int | None, out_of_memory: str | None) -> str:
    if exit_code == -signal.SIGKILL:
        cause = out_of_memory or "by a user or by the out-of-memory killer"
        return f"rank {rank} was killed (SIGKILL){':' if out_of_memory else ','} {cause}"
    if exit_code is None:
        return f"rank {rank} did not exit and was killed"
    if exit_code == 1:
        return f"rank {rank} failed and left no report: {tempfile.gettempdir()} may be full"
    if exit_code < 0:
        return f"rank {rank} was ended by {signal.Signals(-exit_code).name}"
    return f"rank {rank} exited with code {exit_code}"
