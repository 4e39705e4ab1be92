#!/usr/bin/env python3
"""Measure and plot the cost of a step by one size at a time, at a fixed number of tokens.

    experts    8 to 128 of one width, two to a token: the products stay, the parameters grow
    sequence   512 to 8192 tokens of the same 8192: attention grows with the length
    layers     4 to 32
    ranks      1 to 16 on the same cores, experts shared by all: the work stays

Each is a power of its size, c * size^e, fitted to the fastest steps. "ideal" is what e would be if
only what has to grow did.

    python bench/growth.py          # bench/results/growth.json, docs/growth-*.svg
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from dense import config_of
from harness import ROOT, keep, machine, say
from plot import Curve, log_log

from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig

PHASES = {
    "forward and backward": ("forward", "dispatch", "experts", "combine", "backward"),
    "optimizer": ("optimizer", "reduce"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """One point of a curve."""

    experts: int = 8
    layers: int = 2
    seq_length: int = 512
    batch: int = 8
    hidden: int = 128
    expert_ffn: int = 128
    ranks: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """One curve."""

    values: tuple[int, ...]
    sizes: Callable[[int], Sizes]
    why: str


GROWTHS = {
    "experts": Growth(
        values=(8, 16, 32, 64, 128),
        sizes=lambda n: Sizes(experts=n),
        why="optimizer 1, as the parameters; everything else 0, plus one call per expert",
    ),
    "sequence": Growth(
        values=(512, 1024, 2048, 4096, 8192),
        sizes=lambda n: Sizes(seq_length=n, batch=8192 // n),
        why="attention scores 1, products 0",
    ),
    "layers": Growth(
        values=(4, 8, 16, 32),
        sizes=lambda n: Sizes(layers=n, batch=4),
        why="1, minus the share of the output layer",
    ),
    "ranks": Growth(
        values=(1, 2, 4, 8, 16),
        sizes=lambda n: Sizes(ranks=n, batch=16, experts=16),
        why="0 once every core has a rank, plus collectives and work that each process repeats",
    ),
}


def main() -> None:
    """Measure the curves that are asked for, and draw them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=list(GROWTHS))
    parser.add_argument("--steps", type=int, default=2, help="of which the fastest counts")
    args = parser.parse_args()
    for name in args.only or GROWTHS:
        growth, surroundings = GROWTHS[name], machine()
        points = []
        for value in growth.values:
            points.append(step_seconds(growth.sizes(value), args.steps))
            say(f"growth, {name} {value}: {points[-1]}")
        result = {
            "values": list(growth.values),
            "seconds": points,
            "ideal": growth.why,
            "exponents": {
                part: exponent(growth.values, [point[part] for point in points])
                for part in points[0]
            },
        }
        keep("growth", {name: result}, surroundings)
        curves = [Curve(part, [point[part] for point in points]) for part in points[0]]
        svg = log_log(growth.values, curves, x_label=name, y_label="seconds a step")
        (ROOT / "docs" / f"growth-{name}.svg").write_text(svg)
        print(json.dumps({name: result["exponents"]}), flush=True)


def exponent(values: tuple[int, ...], seconds: list[float]) -> dict[str, float]:
    """The e of c * value^e by least squares of logarithms, and of the last doubling alone.

    >>> exponent((1, 2, 4), [3.0, 6.0, 12.0])
    {'fitted': 1.0, 'last': 1.0}
    """
    x, y = np.log(values), np.log(seconds)
    fitted, last = np.polyfit(x, y, 1)[0], (y[-1] - y[-2]) / (x[-1] - x[-2])
    return {"fitted": round(float(fitted), 2), "last": round(float(last), 2)}


def step_seconds(sizes: Sizes, steps: int) -> dict[str, float]:
    """Seconds of a step and of its parts, each the least of ``steps``."""
    from megatron_moe.runtime.world import run_local_ranks

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        config, out = _config(folder, sizes), folder / "seconds.json"
        run_local_ranks(
            lambda world: _measure(world, config, steps, out), ranks=sizes.ranks, device="cpu"
        )
        return json.loads(out.read_text())


def _config(folder: Path, sizes: Sizes) -> RunConfig:
    dense = config_of(
        layers=sizes.layers, hidden=sizes.hidden, ffn=sizes.expert_ffn, heads=4, kv_heads=4,
        vocab=1024,
    )  # fmt: skip
    (folder / "dense").mkdir()
    (folder / "dense" / "config.json").write_text(json.dumps(dense))
    return build(
        RunConfig,
        {
            "run": {"dir": str(folder / "run"), "device": "cpu"},
            "source": {"path": str(folder / "dense")},
            "moe": {"num_moe_experts": sizes.experts},
            "parallel": {"expert_parallel_size": sizes.ranks},
            "data": {"path": "none", "seq_length": sizes.seq_length},
            "train": {"steps": 100, "global_batch_size": sizes.batch, "precision": "fp32",
                      "micro_batch_size": max(1, min(8, sizes.batch // sizes.ranks))},
            "optimizer": {"warmup_steps": 0},
            "log": {"tensorboard": False},
        },
    )  # fmt: skip


def _measure(world: Any, config: RunConfig, steps: int, out: Path) -> None:
    from megatron_moe.bench.steps import Bench, BenchOptions

    it = Bench(config, world, BenchOptions(random=True, routing="balanced"))
    it.timed_step()
    whole, phases = [], []
    for _ in range(steps):
        start = time.perf_counter()
        it.timed_step()
        whole.append(time.perf_counter() - start)
        phases.append(it.profiled_step())
    if world.rank == 0:
        result = {"whole step": min(whole)}
        for part, names in PHASES.items():
            result[part] = min(sum(phase[name] for name in names) for phase in phases)
        out.write_text(json.dumps({part: round(value, 5) for part, value in result.items()}))


if __name__ == "__main__":
    main()
