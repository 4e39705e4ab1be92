"""Count the bytes that a rank sends in collectives, by group, where torch calls the backend.

Every collective of torch.distributed ends in a method of its process group, whoever imported which
name of it; so that is where the hooks are, and nothing can pass beside them. Bytes are those of the
tensors that a call is given, not of what a backend makes of them:

    all_reduce, broadcast    its tensor            all_to_all    what the rank gives, own part too
    all_gather               the gathered whole    send          what is sent; recv is its other end
    reduce_scatter           the whole before

`planner/traffic.py` predicts the same numbers.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_moe.bench.steps import Bench, BenchOptions
from megatron_moe.config.run import RunConfig
from megatron_moe.runtime.world import World

KINDS = {
    "allreduce": ("all_reduce", 0),
    "allreduce_coalesced": ("all_reduce", 0),
    "broadcast": ("broadcast", 0),
    "reduce": ("reduce", 0),
    "allgather": ("all_gather", 0),
    "allgather_coalesced": ("all_gather", 0),
    "all_gather_single": ("all_gather", 0),
    "all_gather_single_coalesced": ("all_gather", 0),
    "reduce_scatter": ("reduce_scatter", 1),
    "reduce_scatter_single": ("reduce_scatter", 1),
    "reduce_scatter_single_coalesced": ("reduce_scatter", 1),
    "all_to_all_single": ("all_to_all", 1),
    "alltoall": ("all_to_all", 1),
    "gather": ("gather", 1),
    "gather_single": ("gather", 1),
    "scatter": ("scatter", 0),
    "send": ("send", 0),
}
"""Methods of a process group: their kind, and which argument holds the bytes that count."""

NAMES_BEFORE_2_14 = {
    "all_gather_single": "_allgather_base",
    "all_gather_single_coalesced": "allgather_into_tensor_coalesced",
    "reduce_scatter_single": "_reduce_scatter_base",
    "reduce_scatter_single_coalesced": "reduce_scatter_tensor_coalesced",
    "all_to_all_single": "alltoall_base",
}
"""Names of these methods before torch 2.14; one without an entry may not exist there."""

AXES = {
    "tp": "tp", "cp": "cp", "pp": "pp", "dp_cp": "dp_cp", "dp": "dp", "ep": "ep", "expt_tp": "etp",
    "expt_dp": "edp", "tp_ep": "etp_ep", "embd": "embedding", "tp_cp": "tp_cp", "mp": "mp",
    "tp_ep_pp": "etp_ep_pp", "tp_dp_cp": "tp_dp_cp", "intra_dist_opt": "optimizer",
}  # fmt: skip
"""Groups of Megatron-Core's collection, in our words."""

Sent = Counter[tuple[str, str]]
"""Bytes by group and kind."""


@dataclass(slots=True)
class Traffic:
    """Bytes that this rank sent in collectives while watched, without groups of one rank."""

    bytes: Sent = field(default_factory=Counter)
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)


def step_bytes(config: RunConfig, world: World) -> Sent:
    """Return the bytes that one training step of random tokens sends, summed over ranks."""
    it = Bench(config, world, BenchOptions(random=True))
    with counted(it.groups) as traffic:
        it.timed_step()
    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, traffic.bytes)
    return sum(everyone, start=Counter())


@contextlib.contextmanager
def counted(groups: ProcessGroupCollection) -> Iterator[Traffic]:
    """Count every collective of this rank for the length of a ``with`` block."""
    traffic, names = Traffic(), _names(groups)

    def count(kind: str, position: int, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def counting(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            if group.size() > 1:
                key = (names.get(group.group_name, group.group_name), kind)
                traffic.bytes[key] += _bytes(args[position])
                traffic.calls[key] += 1
            return call(group, *args, **kwargs)

        return counting

    # As the class holds them: read as attributes, they would forget that they are methods.
    methods = vars(dist.ProcessGroup)
    kinds = {
        name if name in methods else NAMES_BEFORE_2_14.get(name, name): kind
        for name, kind in KINDS.items()
    }
    originals = {name: methods[name] for name in kinds if name in methods}
    for name in originals:
        kind, position = kinds[name]
        call = count(kind, position, getattr(dist.ProcessGroup, name))
        setattr(dist.ProcessGroup, name, call)
    try:
        yield traffic
    finally:
        for name, original in originals.items():
            setattr(dist.ProcessGroup, name, original)


def _names(groups: ProcessGroupCollection) -> dict[str, str]:
    """Our name of each group; where two are one object, the first of `AXES`."""
    assert dist.group.WORLD is not None
    names: dict[str, str] = {dist.group.WORLD.group_name: "world"}
    for attribute, axis in AXES.items():
        group = getattr(groups, attribute, None)
        if isinstance(group, dist.ProcessGroup):
            names.setdefault(group.group_name, axis)
    return names


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_bytes, tensors))
