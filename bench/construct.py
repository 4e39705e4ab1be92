#!/usr/bin/env python3
"""Building experts by what neurons are like or do, on SmolLM2-135M: minutes and memory.

    clustering    balanced k-means of every layer's rows of up, 1536 neurons into 8 equal clusters
    importance    `megatron-moe construct` for sharing_inner: forward and backward over text

SmolLM2's real weights where `make demo` has left them, else random ones of its shape; random
tokens, which cost as much as text.

    python bench/construct.py          # into bench/results/construct.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from dense import config_of, random_dense
from harness import ROOT, held_together, keep, machine, say
from startup import _write_tokens
from step_cases import SMOL, SMOLLM2

MIB = 2**20


def main() -> None:
    """Measure both and keep them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=8, help="sequences of 512 tokens")
    parser.add_argument("--only", choices=["clustering", "importance"], action="append")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        dense = SMOLLM2
        if not (SMOLLM2 / "model.safetensors").exists():
            dense = random_dense(scratch / "dense", config_of(**SMOL, tie_word_embeddings=True))
        _write_tokens(scratch / "tokens", vocab_size=49152)
        for name in args.only or ("clustering", "importance"):
            surroundings = machine()
            clusters = name == "clustering"
            output = clustering(dense, scratch) if clusters else importance(dense, scratch, args)
            output["weights"] = "SmolLM2-135M" if dense == SMOLLM2 else "random, of its shape"
            keep("construct", {name: output}, surroundings)
            print(json.dumps({name: output}, indent=1), flush=True)


def clustering(dense: Path, scratch: Path) -> dict[str, Any]:
    """All 30 layers, on two processes that share them, as two ranks do."""
    settings = {"method": "split_clustered"}
    moe = {"num_moe_experts": 8, "moe_ffn_hidden_size": 192}
    command = [sys.executable, __file__.replace("construct.py", "construct_clusters.py")]
    return _watched([*command, _config(dense, scratch, moe, settings)], name="clustering")


def importance(dense: Path, scratch: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The command on two ranks, with its default batch; a plan file is written."""
    settings = {"method": "sharing_inner", "plan": str(scratch / "plan.safetensors")}
    moe = {"num_moe_experts": 8, "moe_ffn_hidden_size": 192}
    command = [sys.executable, "-m", "megatron_moe", "construct"]
    config = _config(dense, scratch, moe, settings, samples=args.samples)
    output = _watched([*command, config, "--ranks", "2"], name="importance")
    tokens = args.samples * 512
    return {**output, "tokens": tokens, "tokens_per_second": round(tokens / output["seconds"])}


def _config(
    dense: Path,
    scratch: Path,
    moe: dict[str, Any],
    upcycle: dict[str, Any],
    samples: int = 32,
) -> str:
    settings = {
        "run": {"dir": str(scratch / f"run-{upcycle['method']}"), "device": "cpu"},
        "source": {"path": str(dense)},
        "moe": moe,
        "upcycle": {**upcycle, "verify": "never"},
        "measure": {"samples": samples},
        "data": {"path": str(scratch / "tokens"), "seq_length": 512},
        "train": {"steps": 0, "precision": "fp32", "global_batch_size": 2},
        "log": {"tensorboard": False},
    }
    file = scratch / f"{upcycle['method']}.yaml"
    file.write_text(json.dumps(settings))
    return str(file)


def _watched(command: list[str], *, name: str) -> dict[str, Any]:
    """Seconds of a command, and the most memory its processes held together."""
    start, peak, output = time.perf_counter(), 0, 0.0
    process = psutil.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, held_together(process))
        if (seconds := time.perf_counter() - start) - output > 30:
            output = seconds
            say(f"construct, {name}: {seconds:.0f} s, {peak / MIB:.0f} MiB")
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"{command} failed")
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "peak_mib": round(peak / MIB),
        "processes": 2,
    }


if __name__ == "__main__":
    main()
