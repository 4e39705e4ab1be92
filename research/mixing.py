"""Train with an adaptive mixture of seven real domains; write docs/mixing.svg and docs/mixing.json.

This is a small version of Sheared LLaMA: the middle layers of SmolLM2-135M are removed, the rest is
upcycled to 2 experts, top-2, and trained; the weight of a domain follows the excess of its loss
over that of the whole model. It takes some minutes on 2 cores; inputs are created once, below
runs/.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM

from megatron_moe.config.mixtures import PRESETS, SLIMPAJAMA
from megatron_moe.hf.source_files import source_files

ROOT = Path(__file__).parents[1]
DENSE, CUT, DOMAINS = (ROOT / "runs" / p for p in ("models/smollm2-135m", "models/cut", "domains"))
RUN = ROOT / "runs" / "mixing"
REFERENCE = ROOT / "runs" / "mixing-reference.json"
KEPT = (*range(6), *range(24, 30))
"""Layers to keep, of 30."""
SEQ_LENGTH, BATCH, STEPS, STEPS_BETWEEN = 128, 2, 48, 6
COLORS = ("#1b9e77", "#d95f02", "#7570b3", "#e7298a", "#66a61e", "#e6ab02", "#555555")


def main() -> None:
    """Create the inputs, train, and write the plot and its numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="output folder")
    out: Path = parser.parse_args().out
    _run([sys.executable, "tools/get_dense.py", str(DENSE)])
    _run([sys.executable, "tools/get_domains.py", str(DOMAINS)])
    if not CUT.exists():
        cut_layers(DENSE, CUT)
    config = RUN.with_suffix(".yaml")
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(yaml.safe_dump(settings(), sort_keys=False))
    tool = [sys.executable, "-m", "megatron_moe"]
    whole = [f"source.path={DENSE}"]
    _run([*tool, "reference-loss", str(config), "--out", str(REFERENCE), *whole])
    shutil.rmtree(RUN / "checkpoints", ignore_errors=True)
    _run([*tool, "train", str(config)])
    numbers = collect(RUN / "metrics.jsonl")
    (out / "mixing.json").write_text(json.dumps(numbers, indent=1) + "\n")
    (out / "mixing.svg").write_text(plot(numbers))


def settings() -> dict[str, Any]:
    """Return the run's configuration."""
    weights = PRESETS["sheared"]
    return {
        "run": {"dir": str(RUN), "device": "cpu"},
        "source": {"path": str(CUT)},
        "moe": {"num_moe_experts": 2},
        "upcycle": {"verify": "never"},
        "data": {
            "domains": {
                name: {"path": str(DOMAINS / f"{name}.jsonl"), "weight": weights[name]}
                for name in SLIMPAJAMA
            },
            "validation_fraction": 0.05,
            "validation_samples": 4,
            "seq_length": SEQ_LENGTH,
            "mixing": {
                "update": "sheared_llama",
                "reference_losses": str(REFERENCE),
                "interval": STEPS_BETWEEN * BATCH * SEQ_LENGTH,
                "step_size": 0.25,
            },
        },
        "train": {"steps": STEPS, "global_batch_size": BATCH, "micro_batch_size": 2,
                  "precision": "fp32"},
        "optimizer": {"lr": 3e-4, "min_lr": 3e-5, "warmup_steps": 4},
        "checkpoint": {"interval": STEPS, "keep": 1},
        "log": {"tensorboard": False},
    }  # fmt: skip


def cut_layers(dense: Path, out: Path) -> None:
    """Write ``dense`` with only the layers ``KEPT``."""
    model: Any = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    model.model.layers = torch.nn.ModuleList(model.model.layers[layer] for layer in KEPT)
    model.config.num_hidden_layers = len(KEPT)
    model.save_pretrained(out)
    for file in source_files(dense):
        if not (out / file.name).exists():
            shutil.copyfile(file, out / file.name)


def collect(metrics: Path) -> dict[str, Any]:
    """Return losses and weights at the start and at each update, and the inputs of the updates."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    judged = [line for line in lines if "loss/validation" in line]
    mixing = settings()["data"]["mixing"]
    reference = json.loads(REFERENCE.read_text())["losses"]
    seconds = sum(line["time/step_seconds"] for line in lines[1:])
    return {
        "date": date.today().isoformat(),
        "step_size": mixing["step_size"],
        "floor": 1e-4,
        "tokens": [line["step"] * BATCH * SEQ_LENGTH for line in judged],
        "start": {name: settings()["data"]["domains"][name]["weight"] for name in SLIMPAJAMA},
        "reference": {name: reference[name] for name in SLIMPAJAMA},
        "losses": {
            name: [line[f"loss/validation/{name}"] for line in judged] for name in SLIMPAJAMA
        },
        "weights": {
            name: [line[f"mixing/weight/{name}"] for line in judged[1:]] for name in SLIMPAJAMA
        },
        "epochs": {name: lines[-1][f"mixing/epochs/{name}"] for name in SLIMPAJAMA},
        "seconds_per_step": seconds / STEPS,
        "waiting_for_data": sum(line["time/data_seconds"] for line in lines[1:]) / seconds,
    }


def plot(numbers: dict[str, Any]) -> str:
    """Plot weights (above) and losses minus their reference (below) over tokens, as SVG."""
    tokens = numbers["tokens"]
    weights = {n: [numbers["start"][n], *numbers["weights"][n]] for n in SLIMPAJAMA}
    excess = {n: [x - numbers["reference"][n] for x in numbers["losses"][n]] for n in SLIMPAJAMA}
    return "\n".join([
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 470" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="640" height="470" fill="white"/>',
        *_panel(weights, tokens, top=30, title="weight of the domain in the samples to come"),
        *_panel(excess, tokens, top=255, title="held-out loss less the whole dense model's, nats"),
        f'<text x="270" y="462" text-anchor="middle">tokens, up to {tokens[-1]:,}</text>',
        "</svg>\n",
    ])  # fmt: skip


def _panel(rows: dict[str, list[float]], tokens: list[int], *, top: int, title: str) -> list[str]:
    left, width, height = 45, 450, 185
    high = max(max(row) for row in rows.values()) * 1.05
    low = min(0.0, *(min(row) for row in rows.values()))

    def y(value: float) -> float:
        return round(top + height * (high - value) / (high - low), 1)

    parts = [f'<text x="{left}" y="{top - 8}">{title}</text>']
    for i in range(5):
        value = low + (high - low) * i / 4
        parts.append(
            f'<path d="M{left} {y(value)}h{width}" stroke="#ddd"/>'
            f'<text x="{left - 5}" y="{y(value) + 4}" text-anchor="end">{value:.2f}</text>'
        )
    ends = sorted(rows, key=lambda name: -rows[name][-1])
    for position, name in enumerate(ends):
        color = COLORS[SLIMPAJAMA.index(name)]
        points = " ".join(
            f"{left + width * t / tokens[-1]:.1f},{y(v)}"
            for t, v in zip(tokens, rows[name], strict=True)
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts.append(
            f'<text x="{left + width + 10}" y="{top + 14 + 24 * position}" fill="{color}">'
            f"{name} {rows[name][0]:.3f} to {rows[name][-1]:.3f}</text>"
        )
    return parts


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, cwd=ROOT)


if __name__ == "__main__":
    main()
