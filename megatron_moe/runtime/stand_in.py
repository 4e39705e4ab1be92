"""Simulate any rank of any world in one process, without peers, a GPU or memory for tensors.

Model, optimizer and process groups are Megatron-Core's real ones, as that rank would build them.
Only the layers below are fake: groups use torch's fake backend, which joins without peers, and
tensors are on the meta device, which have a shape but no data::

    with simulated_rank(rank, world_size=512):
        layout, groups = create_groups(...)
        with META:
            model = build_model(...)

If Transformer Engine is installed, its modules are built too, even without a GPU driver.
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

# GPU properties that Megatron-Core and Transformer Engine query before they build modules.
_H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132,
    total_memory=80 * 2**30, warp_size=32,
)  # fmt: skip


@contextlib.contextmanager
def simulated_rank(rank: int, *, world_size: int) -> Iterator[None]:
    """Simulate ``rank`` of a job of ``world_size`` ranks inside a ``with`` block.

    The process must not have joined another job. It stays patched by `cpu.install` to run without a
    GPU, so a process that has simulated a rank cannot train on CUDA afterwards.
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
    """Create a group without NCCL's options, which the fake backend does not support."""
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
