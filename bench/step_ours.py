#!/usr/bin/env python3
"""Our side of bench/step.py: `train.train_step` as `megatron-moe train` calls it, when told to."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from step_cases import CASES
from workers import Pipes, serve, subjects, take_pipes

from megatron_moe.runtime import cpu

cpu.install()

from megatron_moe.bench.build import make_supply, make_timed_state
from megatron_moe.config.run import RunConfig
from megatron_moe.hf.dtypes import OF_PRECISION
from megatron_moe.hf.spec import read_spec
from megatron_moe.parallel.groups import create_groups
from megatron_moe.rules.check import check
from megatron_moe.runtime.memory import peak_bytes
from megatron_moe.runtime.world import World, run_local_ranks
from megatron_moe.train.guard import StepGuard
from megatron_moe.train.step import train_step


def main() -> None:
    """Start the ranks of each subject; rank 0 listens and the others do as it does."""
    pipes = take_pipes()
    for about in subjects(pipes):
        case, ranks = CASES[about["case"]], about["ranks"]
        config = case.config(Path(about["dense"]), Path(about["folder"]), ranks)
        check(config, read_spec(config.source.path), ranks)
        config.run.dir.mkdir(parents=True, exist_ok=True)
        run_local_ranks(partial(_rank, config, pipes), ranks=ranks, device="cpu")


def _rank(config: RunConfig, pipes: Pipes, world: World) -> None:
    layout, groups = create_groups(config.parallel, seed=config.run.seed)
    state = make_timed_state(config, world, layout, groups, random=False, balanced=False)
    batches = make_supply(config, state.model.spec, groups, random=True)(state)
    guard = StepGuard(config.guard)

    def step() -> dict[str, Any]:
        dist.barrier()
        start = time.perf_counter()
        result = train_step(state, batches, config, groups, guard=guard, at=lambda _: None)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "loss": result.lm_loss, "grad_norm": result.grad_norm}

    def answer(command: dict[str, Any]) -> dict[str, Any]:
        dist.broadcast_object_list([command], src=0)
        return do(command)

    def do(command: dict[str, Any]) -> dict[str, Any]:
        match command["do"]:
            case "step":
                return step()
            case "product":
                return {"flops": product_flops(OF_PRECISION[config.train.precision])}
            case _:
                return {"peak_gib": peak_bytes() / 2**30}

    if world.rank == 0:
        ready = {"threads": torch.get_num_threads(), "ranks": world.size}
        serve(answer, pipes, ready)
        dist.broadcast_object_list([None], src=0)
        return
    while True:
        heard: list[Any] = [None]
        dist.broadcast_object_list(heard, src=0)
        if heard[0] is None:
            return
        do(heard[0])


def product_flops(dtype: torch.dtype, size: int = 2048) -> float:
    """Return the FLOP/s of a large matrix product at this moment, the best of five."""
    a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    out, seconds = torch.empty(size, size, dtype=dtype), []
    for _ in range(6):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


if __name__ == "__main__":
    main()
