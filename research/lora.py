"""Compare adapters with training all weights, on a small upcycled model.

The model and the texts are those of `research.muon`: 8 copies of a trained FFN, top-2. Every case
trains on the same tokens in the same order. Prints held-out losses and writes them as JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from research.muon import continued, prepare
from research.study.runs import train_case

TARGETS = ["attention", "experts"]
CASES: dict[str, dict[str, Any]] = {
    "all": {},
    "none": {"train": {"freeze": TARGETS}},
    "rank-4": {"lora": {"rank": 4, "targets": TARGETS}},
    "rank-16": {"lora": {"rank": 16, "targets": TARGETS}},
}
"""Settings of each case; none: what is no target is trained alone. alpha stays 32."""
RATES = (1e-3, 3e-3)


def main() -> None:
    """Create the inputs once, train every case that has no result yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder for inputs, runs and results")
    out: Path = parser.parse_args().out
    dense = prepare(out)
    for name, sections in CASES.items():
        for rate in RATES:
            result = out / f"lora-{name}-{rate:g}.json"
            if not result.exists():
                tree = continued(out, dense, "adam", rate)
                tree["run"]["dir"] = str(out / f"run-lora-{name}-{rate:g}")
                for section, values in sections.items():
                    tree[section] = {**tree.get(section, {}), **values}
                train_case(tree, result, about={"lora": name, "lr": rate})
            print(f"{name:8} lr {rate:g}: {json.loads(result.read_text())['validation']}")


if __name__ == "__main__":
    main()
