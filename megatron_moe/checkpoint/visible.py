"""Agree on the checkpoint to resume from, and wait until every host sees all of its files.

On a network file system a host may see ``latest`` for some seconds before the files that it names,
or not see new files at all, because it remembers that they were not there.
"""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_moe.checkpoint.folder import newest
from megatron_moe.errors import CheckpointError
from megatron_moe.runtime.world import World

VISIBLE_SECONDS = 60.0
"""Seconds that a file may take to appear on a host: the default of NFS for what it remembers."""
_POLL_SECONDS = 0.5


def agreed_newest(run_dir: Path, world: World) -> Path | None:
    """Return the newest checkpoint as rank 0 sees it, once all hosts see it; None if there is none.

    All ranks must call it.

    Raises:
        CheckpointError: ``latest`` names no complete checkpoint, or a host does not see it.
    """
    if world.size == 1:
        return newest(run_dir)
    shared: list[Any] = [_newest_of_rank_0(run_dir) if world.rank == 0 else None]
    dist.broadcast_object_list(shared, src=0)
    name, sizes, problem = shared[0]
    if problem is not None:
        raise CheckpointError(problem)
    if name is None:
        return None
    folder = run_dir / "checkpoints" / name
    missing = _wait(folder, sizes) if world.local_rank == 0 else None
    missing_by_rank: list[Any] = [None] * world.size
    dist.all_gather_object(missing_by_rank, missing)
    blind = [(rank, *what) for rank, what in enumerate(missing_by_rank) if what is not None]
    if blind:
        hosts = "; ".join(f"rank {rank} ({host}): {file}" for rank, host, file in blind)
        raise CheckpointError(
            f"{folder} must be visible on all hosts, but after {VISIBLE_SECONDS:.0f} s files are "
            f"missing or shorter than on rank 0: {hosts}.\n"
            "  put run.dir on a file system that all hosts share, or check its mount on these hosts"
        )
    return folder


def _newest_of_rank_0(run_dir: Path) -> tuple[str | None, dict[str, int], str | None]:
    """Return the name of the newest checkpoint, the sizes of its files, and the error if any."""
    try:
        folder = newest(run_dir)
    except CheckpointError as error:
        return None, {}, str(error)
    if folder is None:
        return None, {}, None
    files = [file for file in folder.rglob("*") if file.is_file()]
    return folder.name, {str(f.relative_to(folder)): f.stat().st_size for f in files}, None


def _wait(folder: Path, sizes: dict[str, int]) -> tuple[str, str] | None:
    """Wait until all files have their sizes; return the host and a file that does not."""
    deadline, left = time.monotonic() + VISIBLE_SECONDS, sorted(sizes)
    while True:
        left = [name for name in left if _size(folder / name) != sizes[name]]
        if not left:
            return None
        if time.monotonic() > deadline:
            return socket.gethostname(), left[0]
        time.sleep(_POLL_SECONDS)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
