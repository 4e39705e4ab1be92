"""Predict hours and memory of `construct` for any source's shape: ``construct --dry-run``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_moe.config.run import RunConfig
from megatron_moe.experts.resolve import make_recipe
from megatron_moe.hf.spec import ModelSpec
from megatron_moe.planner.construction import UTILIZATION, construction_cost
from megatron_moe.planner.run_table import amount, duration, size
from megatron_moe.runtime.world import resolve_device
from megatron_moe.train.peak import device_peak


def construct_cost(config: RunConfig, spec: ModelSpec, ranks: int) -> dict[str, Any]:
    """Count the work, measure this machine's speed for a second, and return both with the hours."""
    measure, seq_length = config.measure, config.data.seq_length
    cost = construction_cost(
        make_recipe(spec, config.moe, config.upcycle), spec, measure,
        seq_length=seq_length, ranks=ranks,
    )  # fmt: skip
    device = torch.device(resolve_device(config.run.device, ranks=ranks))
    fp32, fp64 = (
        device_peak(device, dtype).flops_per_second for dtype in (torch.float32, torch.float64)
    )
    if device.type == "cpu":  # ranks share the cores
        fp32, fp64 = fp32 / ranks, fp64
    return {
        **asdict(cost),
        "tokens": measure.samples * seq_length,
        "ranks": ranks,
        "device": device.type,
        "fp32_flops_per_second": fp32,
        "fp64_flops_per_second": fp64,
        "hours": cost.hours(fp32=fp32, fp64=fp64, ranks=ranks),
    }


def cost_report(cost: dict[str, Any]) -> RenderableType:
    """Format the result of `construct_cost` for a terminal."""
    table = Table(title="construct", title_justify="left", show_header=False, box=None)
    tera = {name: cost[name] / 1e12 for name in ("measuring", "fitting", "solving")}
    rows = [
        ("calibration", f"{amount(cost['tokens'])} tokens, {cost['layers']} MoE layers"),
        ("measuring", f"{tera['measuring']:,.3g} TFLOPs in fp32"),
        ("fitting", f"{tera['fitting']:,.3g} TFLOPs in fp32, divided among {cost['ranks']} ranks"),
        ("solving", f"{tera['solving']:,.3g} TFLOPs in fp64, on one rank"),
        ("time", f"about {duration(cost['hours'])} at the speed of this machine"),
        ("memory per rank", f"{size(cost['rank_bytes'])} during a fit, besides text and torch"),
        ("files", size(cost["disk_bytes"])),
    ]
    for name, value in rows:
        table.add_row(name, value)
    note = (
        f"One rank computes {cost['fp32_flops_per_second'] / 1e9:,.0f} GFLOP/s in fp32 and "
        f"{cost['fp64_flops_per_second'] / 1e9:,.0f} in fp64 ({cost['device']}, large products); "
        f"the time assumes {UTILIZATION:.0%} of it."
    )
    return Group(table, Text(note))
