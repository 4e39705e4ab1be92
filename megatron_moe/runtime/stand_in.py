"""One process that stands for any rank of any world: no peers, no GPU, no memory.

Model, optimizer and process groups are Megatron-Core's real ones, as that rank would build them.
Only what they rest on is empty: groups are of torch's fake backend, which joins without peers, and
tensors of the meta device, which have a shape and no numbers::

    with standing_for(rank, world_size=512):
        layout, groups = create_groups(...)
        with META:
            model = build_model(...)

Where Transformer Engine is installed, its modules are built too, on a machine without a driver.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe.runtime import cpu
from megatron_moe.runtime.engine import installed_version

META = torch.device("meta")

# What Megatron-Core and Transformer Engine ask of a GPU before they build anything for it.
_H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132,
    total_memory=80 * 2**30, warp_size=32,
)  # fmt: skip


@contextlib.contextmanager
def standing_for(rank: int, *, world_size: int) -> Iterator[None]:
    """Stand for ``rank`` of a job of ``world_size`` ranks for the length of a ``with`` block.

    The process must not have joined another job. It stays adapted to run without a GPU, as by
    `cpu.install`, so a process that is to train on CUDA must not have stood in before.
    """
    cpu.install()
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    cuda = {"current_device": lambda: META}
    if installed_version() is not None:
        cuda |= {
            "is_available": lambda: True,
            "get_device_properties": lambda *device: _H100,
            "get_device_capability": lambda *device: (_H100.major, _H100.minor),
        }
    with (
        _replaced(torch.cuda, cuda),
        _replaced(parallel_state, {"create_group": _create_group}),
    ):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


def _create_group(ranks: list[int] | None = None, *_: object, **__: object) -> object:
    """A group without NCCL's options, of which the fake backend knows none."""
    return dist.new_group(ranks)


@contextlib.contextmanager
def _replaced(module: Any, replacements: Mapping[str, Any]) -> Iterator[None]:
    before = {name: getattr(module, name) for name in replacements}
    for name, replacement in replacements.items():
        setattr(module, name, replacement)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)
