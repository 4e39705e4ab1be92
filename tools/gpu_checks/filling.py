"""The speed of filling a model from a file, beside reading the file into the GPU."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from gpu_checks.inputs import shape_config
from gpu_checks.session import Session
from gpu_checks.timing import GIB, milliseconds
from megatron_moe.config.run import RunConfig
from megatron_moe.hf.spec import read_spec
from megatron_moe.runtime.world import World

FILL_OF_READ = 0.5
"""Target: bytes of the file per second while a model is filled, as a part of safetensors' load."""


def fill(session: Session) -> None:
    """Upcycle from a file in memory, beside safetensors' load of the same file to the device."""
    config = shape_config(session, "fill", moe={"num_moe_experts": 2})
    with _memory_folder(session) as folder:
        session.on_rank(partial(_fill, session, config, folder))


@contextmanager
def _memory_folder(session: Session) -> Iterator[Path]:
    """Yield a folder in memory, or in the scratch directory where that has too little room."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > session.size(6 * GIB, GIB // 8)
    folder = (memory if roomy else session.folder) / f"gpu-check-{session.folder.name}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fill(session: Session, config: RunConfig, folder: Path, world: World) -> None:
    from safetensors.torch import load_file

    from megatron_moe.bench.steps import Bench, BenchOptions
    from megatron_moe.experts.plan import make_expert_plan
    from megatron_moe.hf.reader import open_safetensors
    from megatron_moe.model.upcycle import upcycle
    from megatron_moe.parallel.layout import fold

    device = world.device
    _write_dense(folder, config.source.path, device)
    model = Bench(config, world, BenchOptions(random=True)).state.model
    dense = open_safetensors(folder)
    plan = make_expert_plan(dense.spec, config.moe, config.upcycle)
    layout = fold(config.parallel, world_size=1)
    file = folder / "model.safetensors"

    def load() -> None:
        load_file(file, device=str(device))

    def fill_model() -> None:
        upcycle(model, dense, plan, layout=layout, rank=0)

    read, filled = (milliseconds(run, device, repeats=3) / 1e3 for run in (load, fill_model))
    size = file.stat().st_size
    parameters = sum(p.numel() * p.element_size() for p in model.modules[0].parameters())
    part = read / filled
    session.add(
        "filling a model", f"{size / filled / 1e9:.1f} GB/s, {part:.0%} of safetensors' load",
        expected=f">= {FILL_OF_READ:.0%}", verdict=session.target(part >= FILL_OF_READ),
        figure=True, file_bytes=size, parameter_bytes=parameters, load_seconds=read,
        fill_seconds=filled, load_gb_per_second=size / read / 1e9,
        fill_gb_per_second=size / filled / 1e9, folder=str(folder),
    )  # fmt: skip


def _write_dense(folder: Path, shape: Path, device: torch.device) -> None:
    """Write random bf16 weights of a shape, drawn on the device."""
    from megatron_moe.hf.names import dense_tensors
    from megatron_moe.hf.writer import FolderWriter

    shapes = dict(dense_tensors(read_spec(shape)))
    announced = {name: (size, torch.bfloat16) for name, size in shapes.items()}
    with FolderWriter(folder / "new", announced) as writer:
        for name, size in shapes.items():
            weight = torch.randn(size, device=device, dtype=torch.bfloat16) * 0.02
            writer.write(name, weight.cpu())
    for file in (folder / "new").iterdir():
        file.rename(folder / file.name)
    shutil.copy(shape / "config.json", folder)
