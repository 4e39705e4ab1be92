"""Measure what bf16 gradient buffers and bf16 moments cost in loss, on a small upcycled model.

The model and the texts are those of `research.muon`. Weights are bf16 with fp32 master weights;
every case trains on the same tokens in the same order. Prints a table and writes it as JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from research.muon import continued, prepare
from research.study.runs import train_case

LR = 1e-3
MOMENTS = {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fp32": ({}, {}),
    "gradients": ({"grad_reduce_in_fp32": False}, {}),
    "moments": ({}, MOMENTS),
    "both": ({"grad_reduce_in_fp32": False}, MOMENTS),
}
"""Settings of each case, of train and of the optimizer."""


def main() -> None:
    """Create the inputs once, train every case that has no result yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder for inputs, runs and results")
    out: Path = parser.parse_args().out
    dense = prepare(out)
    for name, (train, optimizer) in CASES.items():
        result = out / f"precision-{name}.json"
        if not result.exists():
            tree = continued(out, dense, "adam", LR)
            tree["run"]["dir"] = str(out / f"run-precision-{name}")
            tree["train"] |= {"precision": "bf16", **train}
            tree["optimizer"] |= optimizer
            train_case(tree, result, about={"bf16": name})
        print(f"{name:10} {json.loads(result.read_text())['validation']}")


if __name__ == "__main__":
    main()
