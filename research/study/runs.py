"""Run the project's train and construct commands for the study, with one thread each.

A result has ``validation``, a list of pairs (tokens, loss), ``training``, the loss of each step,
and ``domains``, the final losses by domain; all losses are in nats per token.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_moe.checkpoint.folder import newest, read_progress
from megatron_moe.commands.construct import construct
from megatron_moe.commands.train import train
from megatron_moe.config.load import build
from megatron_moe.config.mixtures import SLIMPAJAMA
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import JobError
from megatron_moe.hf.disk import write_text
from megatron_moe.hf.spec import read_spec
from megatron_moe.rules.check import check
from megatron_moe.runtime.world import World, run_local_ranks
from research.study.cases import DENSE, Case

SEQ_LENGTH, BATCH = 128, 16
STEP_TOKENS = SEQ_LENGTH * BATCH
HELD_OUT = 8
"""Held-out sequences of each domain."""


@dataclass(frozen=True, slots=True)
class Training:
    """Number of steps and learning rate of a kind of run."""

    steps: int
    lr: float
    warmup_steps: int


PRETRAIN = Training(steps=700, lr=3e-3, warmup_steps=40)
CONTINUE = Training(steps=40, lr=1e-3, warmup_steps=4)
"""The dense model's learning rate has decayed to a tenth; like LLaMA-MoE, warm up again."""


def settings(
    case: Case, run_dir: Path, dense: Path, tokens: Path, how: Training, *, seed: int,
    mix_with: Sequence[Path] = (), domains: Sequence[str] = SLIMPAJAMA,
) -> dict[str, Any]:  # fmt: skip
    """Return the configuration of one run as in its YAML file."""
    upcycle: dict[str, Any] = {**case.upcycle, "seed": seed, "verify": "never"}
    if mix_with:
        upcycle["mix_with"] = [str(path) for path in mix_with]
    if case.measured:
        upcycle["plan"] = str(run_dir / "measured.safetensors")
    return {
        "run": {"dir": str(run_dir), "device": "cpu", "seed": seed},
        "source": {"path": str(dense)},
        "moe": case.moe(read_spec(dense).ffn_hidden_size),
        "upcycle": upcycle,
        "measure": {"samples": 32, "hidden_states": 1024, "interval": 1000},
        "data": {
            "domains": {
                name: {"path": str(tokens / name), "weight": 1 / len(domains)} for name in domains
            },
            "validation_fraction": 0.05,
            "validation_samples": HELD_OUT,
            "seq_length": SEQ_LENGTH,
        },
        "train": {"steps": how.steps, "global_batch_size": BATCH, "micro_batch_size": BATCH,
                  "precision": "fp32"},
        "optimizer": {"lr": how.lr, "min_lr": how.lr / 10, "warmup_steps": how.warmup_steps},
        "checkpoint": {"interval": max(1, how.steps // 2), "keep": 1},
        "log": {"tensorboard": False},
    }  # fmt: skip


def train_case(tree: dict[str, Any], result: Path, *, about: dict[str, Any]) -> None:
    """Construct if needed, train, write ``result`` and delete the checkpoints."""
    run_dir, start = Path(tree["run"]["dir"]), time.monotonic()
    train_run(tree)
    step_tokens = tree["train"]["global_batch_size"] * tree["data"]["seq_length"]
    collected = collect(run_dir / "metrics.jsonl", step_tokens=step_tokens)
    values = {**about, **collected, "seconds": time.monotonic() - start}
    shutil.rmtree(run_dir / "checkpoints")
    write_result(result, values)


def train_run(tree: dict[str, Any]) -> None:
    """Construct if needed, and train; an interrupted run is resumed."""
    config = build(RunConfig, tree)
    check(config, read_spec(config.source.path), 1)
    config.run.dir.mkdir(parents=True, exist_ok=True)
    plan = config.upcycle.plan
    if plan is not None and not plan.exists():
        on_one_thread(partial(construct, config))
    on_one_thread(partial(train, config))
    last = newest(config.run.dir)
    if last is None or read_progress(last).step < config.train.steps:  # it returns if asked to stop
        raise JobError(f"{config.run.dir} was stopped before its last step")


def on_one_thread(work: Callable[[World], object]) -> None:
    """Run ``work`` on one rank with one thread."""

    def run(world: World) -> None:
        torch.set_num_threads(1)
        work(world)

    run_local_ranks(run, ranks=1, device="cpu")


def dense_run(
    run_dir: Path, dense: Path, tokens: Path, how: Training, domains: Sequence[str] = SLIMPAJAMA
) -> dict[str, Any]:
    """Return the configuration for training a dense model."""
    return settings(DENSE, run_dir, dense, tokens, how, seed=0, domains=domains)


def collect(metrics: Path, *, step_tokens: int = STEP_TOKENS) -> dict[str, Any]:
    """Collect the losses of a finished run."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    judged = [line for line in lines if "loss/validation" in line]
    prefix = "loss/validation/"
    return {
        "validation": [
            [line["step"] * step_tokens, round(line["loss/validation"], 5)] for line in judged
        ],
        "training": [round(line["loss/lm"], 4) for line in lines if line["step"]],
        "domains": {
            name.removeprefix(prefix): round(loss, 5)
            for name, loss in judged[-1].items()
            if name.startswith(prefix)
        },
    }


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result atomically."""
    write_text(path, json.dumps(result) + "\n")
