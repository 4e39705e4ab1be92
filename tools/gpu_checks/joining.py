"""Checks 1 and 2: joining a job of one rank, and where parameters are placed."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gpu_checks.inputs import tiny_config
from gpu_checks.session import Session, passed
from gpu_checks.timing import GIB, synchronize, world_device
from megatron_moe.config.run import Parallel, RunConfig
from megatron_moe.runtime.world import World

JOIN_SECONDS = 10.0


def join(session: Session) -> None:
    """Measure joining: as the package does it, and by hand without and with ``device_id``."""
    session.on_rank(partial(_as_the_package_does, session, time.time()))
    for bound in (False, True) if session.device == "cuda" else (False,):
        process = multiprocessing.get_context("fork").Process(
            target=_by_hand, args=(session, bound)
        )
        process.start()
        process.join()
        if process.exitcode:
            label = f"by hand, {_label(bound)}"
            session.add(label, f"exit code {process.exitcode}", verdict="FAIL")


def _as_the_package_does(session: Session, start: float, world: World) -> None:
    from megatron_moe.parallel.groups import create_groups

    joined = time.time()
    create_groups(Parallel(), seed=0)
    _use(world.device)
    _report(
        session, "as the package joins", time.time() - joined, world.device, fork=joined - start
    )


def _by_hand(session: Session, bound: bool) -> None:
    """Join in a fresh process, with torch's calls only."""
    device = world_device(session.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        synchronize(device)
    else:
        from megatron_moe.runtime import cpu

        cpu.install()
    from megatron_moe.parallel.groups import create_groups, destroy_groups

    before, start = _used_gib(device), time.time()
    with tempfile.TemporaryDirectory() as name:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=(Path(name) / "rendezvous").as_uri(), rank=0, world_size=1,
            device_id=device if bound else None,
        )  # fmt: skip
        create_groups(Parallel(), seed=0)
        _use(device)
        _report(session, f"by hand, {_label(bound)}", time.time() - start, device, before=before)
        destroy_groups()
        dist.destroy_process_group()


def _use(device: torch.device) -> None:
    """Make the world's communicator, and wait for it."""
    dist.all_reduce(torch.ones(1, device=device))
    synchronize(device)


def _report(
    session: Session, what: str, seconds: float, device: torch.device, *,
    fork: float = 0.0, before: float = 0.0,
) -> None:  # fmt: skip
    used = _used_gib(device) - before
    session.add(
        what, f"{seconds + fork:.2f} s, {used:.2f} GiB",
        expected=f"<= {JOIN_SECONDS:.0f} s", verdict=session.target(seconds <= JOIN_SECONDS),
        groups_seconds=seconds, fork_and_join_seconds=fork, used_gib=used,
    )  # fmt: skip


def _used_gib(device: torch.device) -> float:
    """Return what the driver counts as used on the GPU, contexts and NCCL's buffers included."""
    if device.type == "cpu":
        return 0.0
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) / GIB


def _label(bound: bool) -> str:
    return "with device_id" if bound else "without device_id"


PLACEMENT: dict[str, dict[str, dict[str, Any]]] = {
    "defaults, bf16": {"train": {"precision": "bf16"}},
    "optimizer of every rank whole": {"optimizer": {"use_distributed_optimizer": False}},
    "gate noisy_mlp, fp32": {"moe": {"router_gate": "noisy_mlp"}},
    "gate noisy_mlp, bf16": {"moe": {"router_gate": "noisy_mlp"}, "train": {"precision": "bf16"}},
}


def placement(session: Session) -> None:
    """Take one step of each configuration, and list parameters and buffers on another device."""
    configs = {
        name: tiny_config(session, f"placement-{index}", **changes)
        for index, (name, changes) in enumerate(PLACEMENT.items())
    }
    session.on_rank(partial(_place_all, session, configs))


def _place_all(session: Session, configs: dict[str, RunConfig], world: World) -> None:
    for name, config in configs.items():
        try:
            _place(session, name, config, world)
        except Exception as error:  # the next configuration may work
            session.add(name, f"{type(error).__name__}: {str(error)[:200]}", verdict="FAIL")


def _place(session: Session, name: str, config: RunConfig, world: World) -> None:
    from megatron_moe.bench.steps import Bench, BenchOptions
    from megatron_moe.parallel.groups import destroy_groups

    try:
        bench = Bench(config, world, BenchOptions())
        module = bench.state.model.modules[0]
        tensors = [*module.named_parameters(), *module.named_buffers()]
        elsewhere = [key for key, tensor in tensors if tensor.device != world.device]
        loss = float(bench.timed_step()["loss/lm"])
        session.add(
            name, f"{len(elsewhere)} elsewhere, loss {loss:.4f}",
            expected=f"all on {world.device}, a finite loss",
            verdict=passed(not elsewhere and loss == loss), elsewhere=elsewhere, loss=loss,
        )  # fmt: skip
    finally:
        destroy_groups()
