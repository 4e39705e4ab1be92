"""Read from the environment which rank of which job this process is.

Launchers are torchrun, Kubeflow (the same variables), SLURM's srun, and mpirun of Open MPI or of
MPICH. A process without a launcher starts its own ranks.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from megatron_moe.errors import ConfigError

_PORT = "29500"
ELASTIC = "MEGATRON_MOE_ELASTIC"
"""Variable that launch/nodes.sh sets if torchrun is to restart ranks that a signal has stopped."""
STOPPED = 75
"""Exit status of such ranks: torchrun takes 0 for the end of the job, and would not restart them.
It is the EX_TEMPFAIL of sysexits.h: try again later."""
RESOLVE_SECONDS = 60.0
"""Seconds that the name of the first host may take to be published."""


@dataclass(frozen=True, slots=True)
class RankPosition:
    """Position that the launcher assigned to a process, before it joins the job."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    init_method: str
    """``env://`` (torchrun), ``tcp://HOST:PORT``, or ``file:`` and the path of a file."""

    @property
    def address(self) -> str:
        """Address at which the other ranks reach rank 0."""
        if self.init_method.startswith("file:"):
            return "127.0.0.1"
        url = urlsplit(self.init_method)
        return url.hostname or os.environ["MASTER_ADDR"]


@dataclass(frozen=True, slots=True)
class _Launcher:
    """Names of the variables that a launcher sets."""

    name: str
    rank: str
    size: str
    local_rank: str
    local_size: str


_TORCHRUN = _Launcher("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_SRUN = _Launcher("srun", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")
_LAUNCHERS = (
    _TORCHRUN,
    _SRUN,
    _Launcher(
        "mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    _Launcher("mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)  # fmt: skip


def position_from_environment() -> RankPosition | None:
    """Return the position that a launcher assigned; None if this process starts its own ranks.

    A job of one rank needs no launcher, so its variables, which a notebook or a container may have
    left behind, do not count.

    Raises:
        ConfigError: Variables of a launcher contradict each other, or an address is missing.
    """
    env = os.environ
    for launcher in _LAUNCHERS:
        if launcher.rank not in env or launcher.size not in env:
            continue
        rank, size = _integer(env, launcher.rank), _integer(env, launcher.size)
        if size == 1 and launcher is not _TORCHRUN:
            return None
        if not 0 <= rank < size:
            raise ConfigError(
                f"{launcher.rank} ({rank}) must be from 0 to {launcher.size} ({size}) - 1: "
                f"{launcher.name} numbers the ranks of a job from 0.\n"
                f"  unset both to start ranks here with --ranks"
            )
        if size == 1 and "MASTER_ADDR" not in env:
            return None
        if launcher is _SRUN and not ("SLURM_STEP_ID" in env or "SLURM_STEPID" in env):
            print(
                f"SLURM_NTASKS is {size}, but this process was not started by srun: it starts its "
                "own ranks on this node (--ranks). Use srun to run on all tasks.",
                file=sys.stderr,
            )
            return None
        return _position(launcher, rank, size)
    return None


def _position(launcher: _Launcher, rank: int, size: int) -> RankPosition:
    env = os.environ
    local_rank = _integer(env, launcher.local_rank, default=0)
    local_size = _integer(env, launcher.local_size, default=1)
    address = env.get("MASTER_ADDR")
    if address is None and local_size == size:
        address = "127.0.0.1"  # all ranks are on this machine
    if address is None:
        raise ConfigError(
            f"{launcher.name} started this job, but MASTER_ADDR is not set: ranks connect to that "
            "host.\n  export MASTER_ADDR=<first host of the job>, as launch/slurm.sbatch does; or, "
            f"if this is not a job of {size} ranks, unset {launcher.rank} and {launcher.size}"
        )
    method = f"tcp://{address}:{env.get('MASTER_PORT', _PORT)}"
    if launcher is _TORCHRUN and "MASTER_ADDR" in env:
        env.setdefault("MASTER_PORT", _PORT)
        method = "env://"  # torchrun's agent may already serve the store
    return RankPosition(rank, size, local_rank, local_size, method)


def wait_until_resolved(position: RankPosition, seconds: float = RESOLVE_SECONDS) -> None:
    """Wait until this host can resolve the name at which rank 0 is reached.

    The name of a pod is published some seconds after the pod has started. torch would try for hours
    and print a warning each time.

    Raises:
        ConfigError: The name is still unknown after ``seconds``.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.getaddrinfo(position.address, None)
            return
        except socket.gaierror as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"MASTER_ADDR ({position.address}) cannot be resolved on {socket.gethostname()}"
                    f" ({error.strerror}): ranks connect to that host.\n"
                    "  set MASTER_ADDR to an IP address, or to a name that every node can resolve"
                ) from error
        time.sleep(min(1.0, seconds))


def _integer(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError as error:
        raise ConfigError(
            f"{name} ({text!r}) must be an integer: a launcher sets it to a rank or to a number of "
            f"ranks.\n  unset {name}, if no launcher started this process"
        ) from error
