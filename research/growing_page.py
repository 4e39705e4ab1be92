"""Write the tables of docs/growing.md from docs/growing.json, the results of `research.growing`.

Runs are compared seed by seed: the same seed means the same text in the same order. A difference
counts if all seeds agree on its sign.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from megatron_moe.markdown import markdown_table, with_tables
from research.study.page import spread

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE, NUMBERS = DOCS / "growing.md", DOCS / "growing.json"

FROM_8, FROM_16, FROM_16_K4 = "8 experts", "16 from the start", "16 top-4 from the start"
PAIRS = (
    (FROM_16, FROM_8),
    ("noise", FROM_16),
    ("load", FROM_16),
    ("utility", FROM_16),
    ("bias", FROM_16),
    ("exact", FROM_16_K4),
    ("exact, FLOPs of top-4", FROM_16_K4),
    ("exact, FLOPs of top-2", FROM_16),
    ("exact", FROM_8),
    ("load", "noise"),
    ("utility", "noise"),
)
"""Runs that are compared: A, and what it is compared with."""

Numbers = dict[str, Any]


def main() -> None:
    """Rewrite the tables of the page."""
    numbers = json.loads(NUMBERS.read_text())
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), numbers), encoding="utf-8")


def render(text: str, numbers: Numbers) -> str:
    """Return the page with current tables."""
    tables = {"runs": runs_table, "differences": differences_table, "origin": origin}
    return with_tables(text, {name: partial(table, numbers) for name, table in tables.items()})


def origin(numbers: Numbers) -> str:
    """Return when, where and with which versions the runs were made."""
    versions = ", ".join(f"{name} {number}" for name, number in numbers["versions"].items())
    runs, dense = numbers["runs"], numbers["dense"]["validation"]
    hours = sum(run["seconds"] for run in runs) / 3600
    made = f"{numbers['date']}, commit {numbers['commit']}, {numbers['cores']} cores"
    return (
        f"{made} shared with other work,\n{versions}. {len(runs)} runs of stage 2 took "
        f"{hours:.1f} hours. The dense model\n"
        f"was trained on {dense[-1][0]:,} tokens, from a loss of {dense[0][1]:.2f} to "
        f"{dense[-1][1]:.2f}. Losses are nats per token\non {numbers['held_out_tokens']:,} tokens "
        "of held-out text.\n"
    )


def runs_table(numbers: Numbers) -> str:
    """Return tokens, FLOPs and held-out losses of each run, over the seeds."""
    rows = []
    for name in dict.fromkeys(run["case"] for run in numbers["runs"]):
        runs = [run for run in numbers["runs"] if run["case"] == name]
        losses = [[loss for _, loss in run["validation"]] for run in runs]
        rows.append([
            name, f"{runs[0]['tokens']:,}", f"{runs[0]['teraflops']:.2f}", str(len(runs)),
            spread([row[0] for row in losses]), spread([row[-1] for row in losses]),
        ])  # fmt: skip
    head = ["run", "tokens", "TFLOPs", "seeds", "loss when stage 2 begins", "loss at the end"]
    return markdown_table(head, rows)


def differences_table(numbers: Numbers) -> str:
    """Return the difference in the final loss of each pair, over the seeds."""
    rows = []
    for one, other in PAIRS:
        values = differences(numbers, one, other)
        rows.append([
            one, other, ratio(numbers, one, other, "tokens"),
            ratio(numbers, one, other, "teraflops"), spread(values, sign=True), verdict(values),
        ])  # fmt: skip
    head = ["A", "B", "tokens, A / B", "FLOPs, A / B", "loss, A - B", "seeds"]
    return markdown_table(head, rows)


def differences(numbers: Numbers, one: str, other: str) -> list[float]:
    """Return the final loss of ``one`` minus that of ``other`` for each seed that both have."""
    ends = {(run["case"], run["seed"]): run["validation"][-1][1] for run in numbers["runs"]}
    seeds = sorted({seed for _, seed in ends})
    pairs = [(ends.get((one, seed)), ends.get((other, seed))) for seed in seeds]
    return [a - b for a, b in pairs if a is not None and b is not None]


def ratio(numbers: Numbers, one: str, other: str, key: str) -> str:
    """Return the quotient of a cost of two runs."""
    costs = {run["case"]: run[key] for run in numbers["runs"]}
    return f"{costs[one] / costs[other]:.3f}" if one in costs and other in costs else "-"


def verdict(values: list[float]) -> str:
    """Return whether the seeds agree on the sign."""
    if len(values) < 3:
        return "too few"
    if max(values) < 0:
        return "A is lower"
    return "A is higher" if min(values) > 0 else f"disagree, mean {mean(values):+.3f}"


if __name__ == "__main__":
    main()
