#!/usr/bin/env python3
"""Filling one rank's parameters from a dense checkpoint: ours, a plain copy, and two other ways.

    copying        as many bytes as the shard has, by read() from warm pages into parameters
    transformers   from_pretrained, a state dict of the whole MoE, this rank's part of it
    megatron       Megatron-Core's upcycle_state_dict between its dense and its MoE model

A random Llama of 0.33 B parameters in bf16, 8 experts top-2 under EP8; each side in a process of
its own that stands for rank 0 of 8, in turns. Then index lists, row by row where a naive reader
would go, and one rank of 512 of a 70B model whose file is sparse.

    python bench/upcycle.py --rounds 3          # into bench/results/upcycle.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from dense import config_of, random_dense, sparse_dense
from harness import GIB, keep, machine, ratios, say, spread_of
from workers import Worker

SIZES = {"layers": 16, "hidden": 1024, "ffn": 4096, "heads": 16, "kv_heads": 8, "vocab": 32000}
LLAMA_70B = {
    "layers": 80, "hidden": 8192, "ffn": 28672, "heads": 64, "kv_heads": 8, "vocab": 128256,
}  # fmt: skip
EP8 = {"world_size": 8, "rank": 0, "parallel": {"expert_parallel_size": 8}}
E8T2 = {"num_moe_experts": 8, "moe_router_topk": 2}
SIDES = ("copying", "ours", "transformers", "megatron")
MIB = 2**20

SELECTIONS: dict[str, dict[str, Any]] = {
    "copy, etp2 x ep4: columns of down": {
        "moe": E8T2,
        "world_size": 8,
        "rank": 0,
        "parallel": {"expert_parallel_size": 4, "expert_tensor_parallel_size": 2},
    },
    "split_random, 8 experts on one rank: scattered rows and columns": {
        "moe": {"num_moe_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 512},
        "upcycle": {"method": "split_random", "verify": "never"},
        "world_size": 1,
        "rank": 0,
    },
    "split_random, 16 experts, ep8": {
        "moe": {"num_moe_experts": 16, "moe_router_topk": 4, "moe_ffn_hidden_size": 256},
        "upcycle": {"method": "split_random", "verify": "never"},
        **EP8,
    },
}


def main() -> None:
    """Measure all, print and keep it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="of each comparison")
    parser.add_argument("--only", choices=["sides", "selections", "one of 512"], action="append")
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        Worker("upcycle_sides.py", threads=1) as worker,
    ):
        scratch = Path(folder)
        dense = random_dense(scratch / "dense", config_of(**SIZES), torch.bfloat16)
        for name in args.only or ("sides", "selections", "one of 512"):
            surroundings = machine()
            if name == "sides":
                cases = {"EP8": compare(worker, {"moe": E8T2, **EP8}, dense, SIDES, args.rounds)}
            elif name == "selections":
                cases = {
                    case: compare(worker, about, dense, ("copying", "ours"), args.rounds)
                    for case, about in SELECTIONS.items()
                }
            else:
                cases = {"70B, one rank of 512": one_of_512(worker, scratch)}
            keep("upcycle", cases, surroundings)
            print(json.dumps(cases, indent=1), flush=True)


def compare(
    worker: Worker, about: dict[str, Any], dense: Path, sides: tuple[str, ...], rounds: int
) -> dict[str, Any]:
    """Every side in turn, round after round; the file's pages are warm."""
    actual: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    _warm(dense)
    for number in range(rounds):
        for side, output in measured(worker, sides, about, dense):
            actual[side].append(output)
            say(
                f"upcycle, round {number + 1}/{rounds}: {side} {output['seconds']:.2f} s, "
                f"peak {output['peak_bytes'] / MIB:.0f} MiB"
            )
    ours = actual["ours"]
    shard = ours[0]["parameter_bytes"]
    result: dict[str, Any] = {
        "shard_mib": round(shard / MIB, 1),
        "read_mib": round(ours[0]["bytes_read"] / MIB, 1),
        "mib_of_the_tensors_it_needs": round(ours[0]["bytes_of_its_tensors"] / MIB, 1),
        "sides": {
            side: {
                "seconds": spread_of(_of(output, "seconds")),
                "cpu_seconds": spread_of(_of(output, "cpu_seconds")),
                "peak_mib": round(statistics.median(o["peak_bytes"] for o in output) / MIB, 1),
                "beside_shard_mib": round(
                    statistics.median(o["peak_bytes"] - o["parameter_bytes"] for o in output) / MIB,
                    1,
                ),
            }
            for side, output in actual.items()
        },
        "ours_over_copying": {
            kind: ratios(_of(ours, kind), _of(actual["copying"], kind))
            for kind in ("seconds", "cpu_seconds")
        },
    }
    for side in set(sides) - {"ours", "copying"}:
        result[f"{side}_over_ours"] = {
            "seconds": ratios(_of(actual[side], "seconds"), _of(ours, "seconds")),
            "cpu_seconds": ratios(_of(actual[side], "cpu_seconds"), _of(ours, "cpu_seconds")),
            "peak": ratios(_of(actual[side], "peak_bytes"), _of(ours, "peak_bytes")),
        }
    return result


def one_of_512(worker: Worker, scratch: Path) -> dict[str, Any]:
    """Llama-3-70B's shape as 8 experts on 512 ranks, one of them; the file holds zeros."""
    dense = sparse_dense(scratch / "70b", config_of(**LLAMA_70B))
    about = {
        "moe": E8T2,
        "world_size": 512,
        "rank": 137,
        "parallel": {
            "tensor_parallel_size": 4, "pipeline_parallel_size": 16, "expert_parallel_size": 8,
            "expert_tensor_parallel_size": 4,
        },
    }  # fmt: skip
    ((_, output),) = measured(worker, ("ours",), about, dense)
    file = dense / "model.safetensors"
    return {
        "file_gib": round(file.stat().st_size / GIB, 1),
        "file_on_disk_mib": round(file.stat().st_blocks * 512 / MIB, 1),
        "layout": about["parallel"],
        "shard_mib": round(output["parameter_bytes"] / MIB, 1),
        "read_mib": round(output["bytes_read"] / MIB, 1),
        "seconds": round(output["seconds"], 2),
        "open_seconds": round(output["open_seconds"], 3),
        "beside_shard_mib": round((output["peak_bytes"] - output["parameter_bytes"]) / MIB, 1),
    }


def measured(
    worker: Worker, sides: tuple[str, ...], about: dict[str, Any], dense: Path
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each side in a process of its own, one after the other."""
    for side in sides:
        worker.begin(side=side, dense=str(dense), **about)
        worker.wait_ready()
        output = worker.ask(do="fill")
        worker.end()
        yield side, output


def _of(output: list[dict[str, Any]], name: str) -> list[float]:
    return [float(one[name]) for one in output]


def _warm(dense: Path) -> None:
    for file in dense.glob("*.safetensors"):
        with file.open("rb", buffering=0) as opened:
            while opened.read(64 * MIB):
                pass


if __name__ == "__main__":
    main()
