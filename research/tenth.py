"""Train a plain split of SmolLM2-135M, and a solved one with a teacher on a tenth of its tokens.

Each FFN becomes 8 experts, top-2, on the demo's text. Losses are on held-out text of the same kind
and of the kinds of `research.solving`. About an hour of one core; a case that has a result is
skipped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from research.solving import COACTIVE, QUARTER, judged_data, other_texts, settings
from research.study.runs import train_case

STEPS, SEQUENCES = 100, 2
RANDOM = {"method": "split_random", "rescale": "N/K"}
TEACHER = {"logits_weight": 1.0}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int, float]] = {
    "solved, logits, a tenth": (COACTIVE, TEACHER, STEPS // 10, 2e-4),
    "random": (RANDOM, {}, STEPS, 1e-3),
    "solved, a tenth": (COACTIVE, {}, STEPS // 10, 2e-4),
    "random, lr 3e-4": (RANDOM, {}, STEPS, 3e-4),
    "solved, logits": (COACTIVE, TEACHER, STEPS, 3e-4),
}
"""Construction, teacher, steps and learning rate by name."""


def main() -> None:
    """Train every case that has no result yet, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder for texts, the plan and results")
    out: Path = parser.parse_args().out
    other = other_texts(out)
    for name, (upcycle, teacher, steps, lr) in CASES.items():
        result = out / f"{name.replace(', ', '-').replace(' ', '-')}.json"
        if not result.exists():
            tree = case_settings(out, upcycle, steps, lr)
            tree["run"]["dir"] = str(out / f"run-{result.stem}")
            tree["data"] = {**judged_data(other), "validation_samples": 8}
            tree["teacher"] = teacher
            train_case(tree, result, about={"case": name, "steps": steps, "lr": lr})
        print(json.dumps(json.loads(result.read_text())), flush=True)


def case_settings(out: Path, upcycle: dict[str, Any], steps: int, lr: float) -> dict[str, Any]:
    """Return the configuration of one case, without its texts and its teacher."""
    tree = settings(out / "run", QUARTER, dict(upcycle), 64)
    if "fit" in upcycle:
        tree["upcycle"]["plan"] = str(out / "solved.safetensors")
    tree["train"] |= {"steps": steps, "global_batch_size": SEQUENCES, "micro_batch_size": SEQUENCES}
    tree["optimizer"] = {"lr": lr, "min_lr": lr / 10, "warmup_steps": max(1, steps // 10)}
    tree["checkpoint"] = {"interval": max(1, steps // 2), "keep": 1}
    return tree


if __name__ == "__main__":
    main()
