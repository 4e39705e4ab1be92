"""Measure expert specialization by depth; write docs/specialization.json and .svg.

A small Llama with random weights, whose FFNs are split into 8 experts, top-2, is trained on seven
real domains with equal weights. Its routers are then analyzed on held-out text, before the first
step and after the last. Inputs are created once, below runs/; after an interruption, run the same
command to resume.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megatron_moe.analyze.load import between_others, distance_of_halves, distances, shares
from megatron_moe.analyze.record import Analysis, path_of, read_analysis
from megatron_moe.checkpoint.folder import step_folder
from megatron_moe.config.mixtures import SLIMPAJAMA

ROOT = Path(__file__).parents[1]
DENSE, DOMAINS = ROOT / "runs" / "models/small", ROOT / "runs" / "domains"
RUN = ROOT / "runs" / "specialization"
SEQ_LENGTH, BATCH, STEPS = 256, 8, 60
VOCABULARY, LAYERS, HIDDEN, FFN, EXPERTS = 2048, 12, 128, 512, 8
SAMPLES = 16
"""Held-out sequences of each domain to analyze."""
SHOWN = 4
"""Number of layers whose experts are drawn, evenly spaced from the first to the last."""
BEFORE, AFTER = "#888888", "#d95f02"


def main() -> None:
    """Create the inputs, train, analyze, and write the picture and its numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="output folder")
    out: Path = parser.parse_args().out
    _run([sys.executable, "tools/get_domains.py", str(DOMAINS)])
    if not (DENSE / "config.json").exists():
        make_dense(DENSE)
    config = RUN.with_suffix(".yaml")
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(yaml.safe_dump(settings(), sort_keys=False))
    tool = [sys.executable, "-m", "megatron_moe"]
    if not (RUN / "checkpoints" / "latest").exists():
        _run([*tool, "train", str(config), "train.steps=0"])
    _run([*tool, "train", str(config)])
    for step in (0, STEPS):
        text = f"data.validation_samples={SAMPLES}"
        _run([*tool, "analyze", str(step_folder(RUN, step)), text])
    numbers = collect([read_analysis(path_of(RUN, step)) for step in (0, STEPS)])
    (out / "specialization.json").write_text(json.dumps(numbers) + "\n")
    (out / "specialization.svg").write_text(plot(numbers))


def make_dense(folder: Path) -> None:
    """Create a Llama with random weights, and a tokenizer trained on the start of each domain."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    texts = ((DOMAINS / f"{name}.jsonl").read_text()[:500_000] for name in SLIMPAJAMA)
    lines = (line for text in texts for line in text.split("\n")[:-1])
    tokenizer.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(
        folder
    )
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=FFN,
            num_hidden_layers=LAYERS, num_attention_heads=4, max_position_embeddings=SEQ_LENGTH,
            tie_word_embeddings=False,
        )
    ).save_pretrained(folder)  # fmt: skip


def settings() -> dict[str, Any]:
    """Return the run's configuration."""
    return {
        "run": {"dir": str(RUN), "device": "cpu"},
        "source": {"path": str(DENSE)},
        "moe": {"num_moe_experts": EXPERTS, "moe_ffn_hidden_size": FFN // EXPERTS},
        "upcycle": {"method": "split_random", "verify": "never"},
        "data": {
            "domains": {
                name: {"path": str(DOMAINS / f"{name}.jsonl"), "weight": 1 / len(SLIMPAJAMA)}
                for name in SLIMPAJAMA
            },
            "validation_fraction": 0.1,
            "validation_samples": 4,
            "seq_length": SEQ_LENGTH,
        },
        "train": {"steps": STEPS, "global_batch_size": BATCH, "micro_batch_size": BATCH,
                  "precision": "fp32"},
        "optimizer": {"lr": 2e-3, "min_lr": 2e-4, "warmup_steps": 6},
        "checkpoint": {"interval": STEPS, "keep": 2},
        "log": {"tensorboard": False},
    }  # fmt: skip


def collect(analyses: list[Analysis]) -> dict[str, Any]:
    """Return the numbers for the page and the picture."""
    after = analyses[-1]
    return {
        "date": date.today().isoformat(),
        "trained_tokens": after.step * BATCH * SEQ_LENGTH,
        "tokens": after.tokens,
        "layers": after.layers,
        "steps": {str(analysis.step): _of_step(analysis) for analysis in analyses},
    }


def _of_step(analysis: Analysis) -> dict[str, Any]:
    counts_ZHLE = np.array([analysis.counts_of_halves[name] for name in analysis.domains])
    counts_ZLE = counts_ZHLE.sum(axis=1)
    halves_2L = [between_others(distances(counts_ZHLE[:, half])) for half in (0, 1)]
    rows = {
        "apart": between_others(distances(counts_ZLE)),
        "apart_first_half": halves_2L[0],
        "apart_second_half": halves_2L[1],
        "floor": distance_of_halves(counts_ZHLE).mean(axis=0),
        "max_over_mean": np.mean([analysis.max_over_mean[n] for n in analysis.domains], axis=0),
        "confidence": np.mean([analysis.confidence[n] for n in analysis.domains], axis=0),
        "to_dense": np.mean(analysis.similarity.to_dense or [], axis=1),
    }
    return {
        **{name: [round(float(x), 5) for x in row] for name, row in rows.items()},
        "trend": {name: trend(rows[name]) for name in list(rows)[:5]},
        "loss": {name: round(loss, 4) for name, loss in analysis.loss.items()},
        "distances": analysis.distances.mean,
        "shares": {
            str(analysis.layers[row]): shares(counts_ZLE[:, row]).round(4).tolist()
            for row in np.linspace(0, len(analysis.layers) - 1, SHOWN).round().astype(int)
        },
    }


def trend(values_L: Any) -> dict[str, float]:
    """Return how values change with depth: rank correlation, means of the first and last third."""
    values_L = np.asarray(values_L)
    third = len(values_L) // 3
    ranks_L = values_L.argsort().argsort()
    return {
        "rank_correlation": round(float(np.corrcoef(ranks_L, np.arange(len(values_L)))[0, 1]), 3),
        "shallow": round(float(values_L[:third].mean()), 5),
        "deep": round(float(values_L[-third:].mean()), 5),
    }


def plot(numbers: dict[str, Any]) -> str:
    """Plot distances of domains and loads by layer, then the experts of some layers, as SVG."""
    first, last = numbers["steps"]
    rows = numbers["steps"]
    apart = [(BEFORE, rows[first], f"step {first}"), (AFTER, rows[last], f"step {last}")]
    return "\n".join([
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 640" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="760" height="640" fill="white"/>',
        *_panel(apart, top=30, title="L2 distance between domains' choices, mean of pairs; band: "
                "the two halves of the text; dashed: halves of one domain"),
        *_panel(apart, top=225, name="max_over_mean",
                title="busiest expert's tokens over the mean, mean of domains"),
        *_heat_maps(rows[last]["shares"], list(numbers["tokens"]), top=430,
                    title=f"share of each expert, step {last}"),
        "</svg>\n",
    ])  # fmt: skip


def _panel(
    steps: list[tuple[str, dict[str, Any], str]], *, top: int, title: str, name: str = "apart"
) -> list[str]:
    left, width, height = 45, 600, 140
    bands = ("apart_first_half", "apart_second_half", "floor") if name == "apart" else ()
    drawn = [row for _, rows, _ in steps for row in (rows[name], *(rows[b] for b in bands))]
    low, high = (0.0 if bands else 1.0), max(map(max, drawn)) * 1.05
    layers = len(drawn[0])

    def points(values: list[float]) -> list[str]:
        return [
            f"{left + width * i / (layers - 1):.1f},{top + height * (high - v) / (high - low):.1f}"
            for i, v in enumerate(values)
        ]

    parts = [f'<text x="{left}" y="{top - 8}">{title}</text>']
    for i in range(5):
        y = round(top + height * i / 4, 1)
        value = high - (high - low) * i / 4
        parts.append(
            f'<path d="M{left} {y}h{width}" stroke="#ddd"/>'
            f'<text x="{left - 5}" y="{y + 4}" text-anchor="end">{value:.2f}</text>'
        )
    for place, (color, rows, label) in enumerate(steps):
        if bands:
            band = [*points(rows[bands[0]]), *reversed(points(rows[bands[1]]))]
            parts.append(f'<polygon points="{" ".join(band)}" fill="{color}" opacity="0.25"/>')
            parts.append(
                f'<polyline points="{" ".join(points(rows["floor"]))}" fill="none" '
                f'stroke="{color}" stroke-dasharray="4 3"/>'
            )
        parts.append(
            f'<polyline points="{" ".join(points(rows[name]))}" fill="none" stroke="{color}" '
            'stroke-width="2"/>'
        )
        x, y = left + width + 10, top + 14 + 18 * place
        parts.append(f'<text x="{x}" y="{y}" fill="{color}">{label}</text>')
    parts.append(
        f'<text x="{left}" y="{top + height + 14}">layer 0</text>'
        f'<text x="{left + width}" y="{top + height + 14}" text-anchor="end">'
        f"layer {layers - 1}</text>"
    )
    return parts


def _heat_maps(
    layers: dict[str, list[list[float]]], domains: list[str], *, top: int, title: str
) -> list[str]:
    left, cell = 95, 18
    most = max(share for rows in layers.values() for row in rows for share in row)
    parts = [
        f'<text x="45" y="{top - 8}">{title}; white is 0, full colour {most:.2f}</text>',
        *(
            f'<text x="{left - 5}" y="{top + 32 + cell * i}" text-anchor="end">{name}</text>'
            for i, name in enumerate(domains)
        ),
    ]
    for place, (layer, rows) in enumerate(layers.items()):
        x = left + place * (cell * len(rows[0]) + 14)
        parts.append(f'<text x="{x}" y="{top + 12}">layer {layer}</text>')
        for i, row in enumerate(rows):
            for j, share in enumerate(row):
                parts.append(
                    f'<rect x="{x + cell * j}" y="{top + 19 + cell * i}" width="{cell - 1}" '
                    f'height="{cell - 1}" fill="{AFTER}" fill-opacity="{share / most:.2f}" '
                    'stroke="#eee"/>'
                )
    return parts


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, cwd=ROOT)


if __name__ == "__main__":
    main()
