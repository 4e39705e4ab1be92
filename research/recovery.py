"""Compare ways for a split model to recover: solved experts, and what a teacher adds.

A small Llama is trained on every second file of Python's standard library and split into 8 experts,
top-2, so that a token passes a quarter of the neurons. Each case then trains on the other files: a
long run, and one of a tenth of its tokens. Half an hour on 2 idle cores; writes docs/recovery.json
and the curves, docs/recovery.svg.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_moe.markdown import markdown_table
from research.muon import DOMAIN, prepare
from research.study.cases import Case
from research.study.plot import PANEL, WIDTH, panel
from research.study.runs import STEP_TOKENS, Training, settings, train_case

DOCS = Path(__file__).resolve().parents[1] / "docs"
LONG, SHORT, JUDGED = 200, 20, 10
"""Steps of a long run and of a tenth of it, and how often a run is judged on the way."""
SEEDS = (0, 1, 2)
RANDOM = {"method": "split_random", "rescale": "N/K"}
SOLVED = {"method": "split_coactivation", "fit": ["router", "down"]}
DENSE = {"method": "copy"}
LOGITS = {"logits_weight": 1.0}
ALL = {"logits_weight": 1.0, "layers_weight": 1.0, "router_weight": 0.1}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "dense": (DENSE, {}, LONG),
    "random": (RANDOM, {}, LONG),
    "solved": (SOLVED, {}, LONG),
    "solved, logits": (SOLVED, LOGITS, LONG),
    "dense, a tenth": (DENSE, {}, SHORT),
    "random, a tenth": (RANDOM, {}, SHORT),
    "solved, a tenth": (SOLVED, {}, SHORT),
    "random, logits, a tenth": (RANDOM, LOGITS, SHORT),
    "solved, logits, a tenth": (SOLVED, LOGITS, SHORT),
    "solved, layers, a tenth": (SOLVED, {"layers_weight": 1.0}, SHORT),
    "solved, router, a tenth": (SOLVED, {"router_weight": 0.1}, SHORT),
    "solved, all, a tenth": (SOLVED, ALL, SHORT),
}
"""Construction, teacher and steps by name."""


def main() -> None:
    """Create the inputs once, and train every case that has no result yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder for inputs, runs and results")
    out: Path = parser.parse_args().out
    dense = prepare(out)
    for seed in SEEDS:
        for name, (upcycle, teacher, steps) in CASES.items():
            file_name = f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            result = out / f"{file_name}.json"
            if not result.exists():
                tree = case_settings(out, out / f"run-{file_name}", dense, upcycle, steps, seed)
                tree["teacher"] = teacher
                train_case(tree, result, about={"case": name, "seed": seed})
            print(f"{name:24} seed {seed}: {json.loads(result.read_text())['validation']}")
    results = [json.loads(path.read_text()) for path in sorted(out.glob("*-[0-9].json"))]
    (DOCS / "recovery.svg").write_text(plot(results))
    kept = [{key: one[key] for key in ("case", "seed", "validation")} for one in results]
    lines = ",\n".join(json.dumps(one) for one in kept)
    (DOCS / "recovery.json").write_text(f"[\n{lines}\n]\n")


def case_settings(
    out: Path, run_dir: Path, dense: Path, upcycle: dict[str, Any], steps: int, seed: int
) -> dict[str, Any]:
    """Return the configuration of one case without its teacher."""
    how = Training(steps=steps, lr=1e-3, warmup_steps=steps // 10)
    shape = "dense" if upcycle is DENSE else "parts"
    tree = settings(
        Case("split", shape, upcycle), run_dir, dense, out / "continue-tokens", how, seed=seed,
        domains=[DOMAIN],
    )  # fmt: skip
    tree["checkpoint"]["interval"] = steps // JUDGED  # held-out text is judged at each save
    if "fit" in upcycle:
        tree["upcycle"]["plan"] = str(out / f"solved-{seed}.safetensors")
        tree["measure"] = {"samples": 512, "hidden_states": 1024, "interval": 1000}
    return tree


def table(results: list[dict[str, Any]]) -> str:
    """Return held-out losses by case, with the mean and the range over seeds, in Markdown."""
    rows = []
    for name, (_, _, steps) in CASES.items():
        losses = [[loss for _, loss in one["validation"]] for one in results if one["case"] == name]
        columns = list(zip(*losses, strict=True))
        tokens = f"{steps * STEP_TOKENS:,}"
        rows.append(
            [name.removesuffix(", a tenth"), tokens, *map(spread, (columns[0], columns[-1]))]
        )
    return markdown_table(["case", "tokens", "before", "after"], rows)


def curves(results: list[dict[str, Any]]) -> dict[str, NDArray[np.float64]]:
    """Return held-out losses of the long runs, ``(seeds, points)``, by case."""
    return {
        name: np.asarray(
            [[loss for _, loss in one["validation"]] for one in results if one["case"] == name]
        )
        for name, (_, _, steps) in CASES.items()
        if steps == LONG
    }


def costs(results: list[dict[str, Any]]) -> str:
    """Return in Markdown how many tokens a long run takes to each of several held-out losses."""
    mean = {name: losses.mean(axis=0) for name, losses in curves(results).items()}
    tokens = np.linspace(0, LONG * STEP_TOKENS, JUDGED + 1)
    rows = []
    for level in np.arange(5.1, 4.7, -0.1):
        cells = []
        for losses in mean.values():
            least = np.minimum.accumulate(losses)
            reached = least[-1] <= level
            cells.append(f"{np.interp(-level, -least, tokens):,.0f}" if reached else "not reached")
        rows.append([f"{level:.1f}", *cells])
    return markdown_table(["nats", *mean], rows)


def plot(results: list[dict[str, Any]]) -> str:
    """Return the curves of the long runs as SVG."""
    height = PANEL + 20
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        *panel("a small model: solved experts and a teacher", curves(results), top=30),
        f'<text x="260" y="{height - 10}" text-anchor="middle">tokens, up to '
        f"{LONG * STEP_TOKENS:,}; loss on held-out text, nats per token; bands: all seeds</text>",
        "</svg>\n",
    ])  # fmt: skip


def spread(losses: Sequence[float]) -> str:
    """Return mean, least and largest."""
    return f"{sum(losses) / len(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})"


if __name__ == "__main__":
    main()
