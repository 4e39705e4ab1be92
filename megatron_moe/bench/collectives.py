"""Bandwidth of the collectives that a layout lives on, by size: the network, without a model."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_moe.bench.record import CollectivesRecord, Timing, spread
from megatron_moe.bench.surroundings import surroundings
from megatron_moe.runtime.world import World

WARMUP, TIMED = 3, 10
SMALLEST_BYTES = 2**12


@dataclass(frozen=True, slots=True)
class Collective:
    """A collective and what its larger buffer's bytes mean on the wire."""

    run: Callable[[Tensor, Tensor, ProcessGroup], object]
    """Takes the whole buffer, one rank's part of it, and the group."""
    crossings: Callable[[int], float]
    """Times the whole buffer's bytes cross a rank's link, for so many ranks (nccl-tests'
    PERFORMANCE.md)."""


def _exchange(whole: Tensor, part: Tensor, group: ProcessGroup) -> None:
    dist.all_to_all_single(torch.empty_like(whole), whole, group=group)


COLLECTIVES = {
    "all_reduce": Collective(
        lambda whole, part, group: dist.all_reduce(whole, group=group), lambda n: 2 * (n - 1) / n
    ),
    "all_gather": Collective(
        lambda whole, part, group: dist.all_gather_into_tensor(whole, part, group=group),
        lambda n: (n - 1) / n,
    ),
    "reduce_scatter": Collective(
        lambda whole, part, group: dist.reduce_scatter_tensor(part, whole, group=group),
        lambda n: (n - 1) / n,
    ),
    "all_to_all": Collective(_exchange, lambda n: (n - 1) / n),
}


def sizes(largest_bytes: int) -> list[int]:
    """From 4 KiB by factors of four up to ``largest_bytes``.

    >>> sizes(2**17)
    [4096, 16384, 65536]
    """
    result = [SMALLEST_BYTES]
    while result[-1] * 4 <= largest_bytes:
        result.append(result[-1] * 4)
    return result


def bench_collectives(world: World, *, largest_bytes: int) -> CollectivesRecord:
    """Time every collective over all ranks and, where there are several hosts, inside each.

    All ranks call it. Where groups of several hosts run at once, rank 0's is reported.
    """
    groups = {"all ranks": dist.group.WORLD}
    here = _ranks_of_this_host(world)
    if here is not None:
        groups["one host"] = here
    timings = [
        _time(name, label, group, size, world.device)
        for label, group in groups.items()
        if group is not None and group.size() > 1
        for name in COLLECTIVES
        for size in sizes(largest_bytes)
    ]
    return CollectivesRecord(surroundings=surroundings(world.device), timings=timings)


def _ranks_of_this_host(world: World) -> ProcessGroup | None:
    """The ranks of this host; None where it has all of them, or one."""
    hosts: list[str] = [""] * world.size
    dist.all_gather_object(hosts, socket.gethostname())
    if len(set(hosts)) in (1, world.size):
        return None
    members = {host: [r for r, h in enumerate(hosts) if h == host] for host in hosts}
    made: dict[str, Any] = {host: dist.new_group(ranks) for host, ranks in members.items()}
    return made[hosts[world.rank]]


def _time(name: str, label: str, group: ProcessGroup, size: int, device: torch.device) -> Timing:
    ranks = group.size()
    numbers = -(-size // (4 * ranks)) * ranks
    whole = torch.zeros(numbers, dtype=torch.float32, device=device)
    part = torch.zeros(numbers // ranks, dtype=torch.float32, device=device)
    collective, seconds = COLLECTIVES[name], []
    for _ in range(WARMUP + TIMED):
        dist.barrier(group=group)
        _wait(device)
        start = time.perf_counter()
        collective.run(whole, part, group)
        _wait(device)
        seconds.append(time.perf_counter() - start)
    taken = torch.tensor(seconds[WARMUP:], dtype=torch.float64, device=device)
    dist.all_reduce(taken, op=dist.ReduceOp.MAX, group=group)
    measured = spread(taken.tolist())
    crossed = collective.crossings(ranks) * numbers * 4
    return Timing(
        collective=name,
        group=label,
        ranks=ranks,
        bytes=numbers * 4,
        seconds=measured,
        bus_gb_per_second=crossed / measured.median / 1e9,
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
