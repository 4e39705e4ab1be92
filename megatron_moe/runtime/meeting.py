"""Meet the other ranks of a job before the first collective, for a bounded time.

The watch names a rank that is lost, but it starts when all ranks have met. Without a bound, ranks
would wait for one that never starts as long as a collective may take, which is hours.
"""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from megatron_moe.errors import JobError
from megatron_moe.runtime.launchers import RankPosition

MEET_SECONDS = 600.0
"""Seconds that ranks of a job may start apart: some hosts import Python's modules slowly."""
_NAMED = 8
"""Upper bound for the number of missing ranks that are named."""


def meet(position: RankPosition) -> dist.Store:
    """Return the store of the job after all ranks have connected to it.

    Raises:
        JobError: A rank has not come within `MEET_SECONDS`.
    """
    patience = timedelta(seconds=MEET_SECONDS)
    try:
        store = _store(position, patience)
    except dist.DistNetworkError as error:
        raise JobError(
            f"rank {position.rank} cannot connect to rank 0 at {position.address} within "
            f"{MEET_SECONDS:.0f} s: rank 0 has not started or has ended, or its host is unreachable"
        ) from error
    store.set(_key(position.rank), "here")
    keys = {rank: _key(rank) for rank in range(position.size)}
    try:
        store.wait(list(keys.values()), patience)
    except RuntimeError as error:  # DistStoreError, but not from a FileStore
        if reason := _reason(store, keys, position):
            raise JobError(reason) from error
    return store


def _reason(store: dist.Store, keys: dict[int, str], position: RankPosition) -> str:
    """Return why the ranks did not meet; empty if the last has just come."""
    try:
        missing = [rank for rank, key in keys.items() if not store.check([key])]
    except dist.DistError:  # rank 0 keeps the store, and names the missing ranks before it ends
        return (
            f"rank 0 ended before rank {position.rank} saw all {position.size} ranks start: "
            "rank 0 has printed the reason"
        )
    if not missing:
        return ""
    return (
        f"{_listed(missing)} not started within {MEET_SECONDS:.0f} s of rank {position.rank}, "
        "or cannot reach rank 0"
    )


def _store(position: RankPosition, patience: timedelta) -> dist.Store:
    """Connect to the job's store.

    torch percent-encodes the path of a ``file://`` address on some ways and not on others, so that
    ranks wait for each other in different files; a store takes the path itself.
    """
    if position.init_method.startswith("file:"):
        path = position.init_method.removeprefix("file:")
        return dist.FileStore(path, position.size)
    # For one rank, so that torch does not wait here for all: it would not say which is missing.
    way = rendezvous(position.init_method, position.rank, 1, timeout=patience)
    return dist.PrefixStore("ranks", next(way)[0])


def _key(rank: int) -> str:
    return f"met/{rank}"


def _listed(ranks: list[int]) -> str:
    """Return ranks as the subject of a sentence."""
    if len(ranks) == 1:
        return f"rank {ranks[0]} has"
    more = f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else ""
    return f"ranks {', '.join(map(str, ranks[:_NAMED]))}{more} have"
