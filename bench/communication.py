#!/usr/bin/env python3
"""Bytes that a training step puts into collectives, counted on gloo ranks, beside the formula.

Counts do not depend on the machine. The last case is a formula alone: Llama-3-8B on 128 GPUs.

    python bench/communication.py          # into bench/results/communication.json
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from dense import config_of
from harness import ROOT, keep, machine, say

from megatron_moe.config.load import build, load
from megatron_moe.config.run import RunConfig
from megatron_moe.hf.spec import spec_from_config
from megatron_moe.planner.shape import MoeShape, upcycled_shape
from megatron_moe.planner.traffic import Traffic, sent_per_rank, step_traffic
from megatron_moe.planner.workload import Degrees, degrees_of, workload_of

TP, CP, PP, EP, ETP = (
    f"{name}_parallel_size" for name in ("tensor", "context", "pipeline", "expert", "expert_tensor")
)
LAYOUTS: dict[str, tuple[int, dict[str, int], str]] = {
    "dp2 ep2": (2, {EP: 2}, "fp32"),
    "tp2 dp2 ep2": (4, {TP: 2, EP: 2}, "bf16"),
    "cp2 dp2 ep4": (4, {CP: 2, EP: 4}, "bf16"),
    "pp2 dp2 edp2": (4, {PP: 2}, "bf16"),
    "tp2 dp2 ep2 etp2, padded": (4, {TP: 2, EP: 2, ETP: 2}, "bf16"),
}
SIZES = {"layers": 4, "hidden": 128, "ffn": 256, "heads": 8, "kv_heads": 4, "vocab": 1024}
LLAMA3 = {"layers": 32, "hidden": 4096, "ffn": 14336, "heads": 32, "kv_heads": 8, "vocab": 128256}
H100 = "configs/h100/llama3-8b-e8t2-dropless-128.yaml"


def main() -> None:
    """Count and compare; a difference ends the script."""
    surroundings = machine()
    cases: dict[str, Any] = {}
    for name, (ranks, parallel, precision) in LAYOUTS.items():
        say(f"communication: {name}")
        cases[name] = compare(name, ranks, parallel, precision)
    cases["Llama-3-8B E8T2, 128 GPUs"] = predicted(ROOT / H100, gpus=128)
    keep("communication", cases, surroundings)
    print(json.dumps({name: case["groups"] for name, case in cases.items()}, indent=1))
    if not all(case.get("equal", True) for case in cases.values()):
        sys.exit("counted bytes differ from the formula")


def compare(name: str, ranks: int, parallel: dict[str, int], precision: str) -> dict[str, Any]:
    """One layout on real ranks."""
    from megatron_moe.runtime.world import run_local_ranks

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        config = _config(folder, parallel, precision, padded="padded" in name)
        out = folder / "counted.json"
        run_local_ranks(lambda world: _count(world, config, out), ranks=ranks, device="cpu")
        counted = {tuple(key.split()): n for key, n in json.loads(out.read_text()).items()}
    degrees = degrees_of(config, gpus=ranks)
    shape = upcycled_shape(spec_from_config(config_of(**SIZES)), config.moe)
    rows = None
    if config.moe.moe_pad_expert_input_to_capacity:
        tokens = config.data.seq_length // (degrees.tp * degrees.cp)
        rows = int(tokens * config.moe.moe_router_topk * 2.0)
    formula = step_traffic(shape, workload_of(config), degrees, padded_rows=rows)
    log = counted.pop(("world", "all_reduce"), 0)
    return {
        "ranks": ranks,
        "precision": precision,
        "equal": counted == formula,
        "numbers_of_the_log_bytes": log,
        "groups": _groups(formula, counted, degrees),
    }


def predicted(path: Path, *, gpus: int) -> dict[str, Any]:
    """The formula for a configuration of configs/h100."""
    config = load(RunConfig, path)
    shape: MoeShape = upcycled_shape(spec_from_config(config_of(**LLAMA3)), config.moe)
    degrees = degrees_of(config, gpus=gpus)
    formula = step_traffic(shape, workload_of(config), degrees)
    return {"ranks": gpus, "config": path.name, "groups": _groups(formula, None, degrees)}


def _groups(formula: Traffic, counted: Any, degrees: Degrees) -> dict[str, dict[str, float]]:
    """By group: bytes given to collectives over all ranks, and what must leave a rank."""
    sent = sent_per_rank(formula, degrees)
    result: dict[str, dict[str, float]] = {}
    for group in sorted({key[0] for key in (*formula, *(counted or ()))}):
        result[group] = {
            "formula_bytes": sum(n for key, n in formula.items() if key[0] == group),
            "sent_per_rank_bytes": round(sent.get(group, 0.0)),
        }
        if counted is not None:
            result[group]["counted_bytes"] = sum(n for key, n in counted.items() if key[0] == group)
    return result


def _config(folder: Path, parallel: dict[str, int], precision: str, *, padded: bool) -> RunConfig:
    (folder / "dense").mkdir()
    (folder / "dense" / "config.json").write_text(json.dumps(config_of(**SIZES)))
    moe: dict[str, Any] = {"num_moe_experts": 8}
    if padded:  # where routing is uneven, gloo's gathers are padded, and no count is exact
        moe |= {"moe_expert_capacity_factor": 2.0, "moe_pad_expert_input_to_capacity": True}
    return build(
        RunConfig,
        {
            "run": {"dir": str(folder / "run"), "device": "cpu"},
            "source": {"path": str(folder / "dense")},
            "moe": moe,
            "parallel": parallel,
            "data": {"path": "none", "seq_length": 128},
            "train": {"steps": 10, "global_batch_size": 8, "precision": precision},
            "optimizer": {"warmup_steps": 0},
            "log": {"tensorboard": False},
        },
    )


def _count(world: Any, config: RunConfig, out: Path) -> None:
    from megatron_moe.bench.traffic import step_bytes

    total = step_bytes(config, world)
    if world.rank == 0:
        out.write_text(json.dumps({" ".join(key): n for key, n in total.items()}))


if __name__ == "__main__":
    main()
