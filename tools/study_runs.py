"""Runs of the study: the project's own train and construct, one thread each, and what they leave.

Shapes of a result: ``validation`` is a list of pairs (tokens, loss), ``training`` the loss of every
step, ``domains`` the losses at the end by domain; all in nats per token.
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
from study_cases import DENSE, Case

from megatron_moe.checkpoint.folder import newest, read_progress
from megatron_moe.commands.construct import construct
from megatron_moe.commands.train import train
from megatron_moe.config.load import build
from megatron_moe.config.mixtures import SLIMPAJAMA
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import JobError
from megatron_moe.hf.spec import read_spec
from megatron_moe.rules.check import check
from megatron_moe.runtime.world import World, run_local_ranks

SEQ_LENGTH, BATCH = 128, 16
STEP_TOKENS = SEQ_LENGTH * BATCH
HELD_OUT = 8
"""Sequences of each domain."""


@dataclass(frozen=True, slots=True)
class Training:
    """How long and how fast one kind of run learns."""

    steps: int
    lr: float
    warmup_steps: int


PRETRAIN = Training(steps=700, lr=3e-3, warmup_steps=40)
CONTINUE = Training(steps=40, lr=1e-3, warmup_steps=4)
"""The dense model's own learning rate has decayed to a tenth; LLaMA-MoE too warms up again."""


def settings(
    case: Case, run_dir: Path, dense: Path, tokens: Path, how: Training, *, seed: int,
    mix_with: Sequence[Path] = (), domains: Sequence[str] = SLIMPAJAMA,
) -> dict[str, Any]:  # fmt: skip
    """The configuration of one run, as YAML would hold it."""
    upcycle: dict[str, Any] = {**case.upcycle, "seed": seed, "verify": "never"}
    if mix_with:
        upcycle["mix_with"] = [str(path) for path in mix_with]
    if case.measured:
        upcycle["plan"] = str(run_dir / "measured.safetensors")
    return {
        "run": {"dir": str(run_dir), "device": "cpu", "seed": seed},
        "dense": {"path": str(dense)},
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
    """Construct where needed, train, and write ``result``; checkpoints go."""
    run_dir, start = Path(tree["run"]["dir"]), time.monotonic()
    train_run(tree)
    found = {**about, **collect(run_dir / "metrics.jsonl"), "seconds": time.monotonic() - start}
    shutil.rmtree(run_dir / "checkpoints")
    write_result(result, found)


def train_run(tree: dict[str, Any]) -> None:
    """Construct where needed, and train; a run that was killed goes on."""
    config = build(RunConfig, tree)
    check(config, read_spec(config.dense.path), 1)
    config.run.dir.mkdir(parents=True, exist_ok=True)
    plan = config.upcycle.plan
    if plan is not None and not plan.exists():
        on_one_thread(partial(construct, config))
    on_one_thread(partial(train, config))
    last = newest(config.run.dir)
    if last is None or read_progress(last).step < config.train.steps:  # told to stop, it returns
        raise JobError(f"{config.run.dir} was stopped before its last step")


def on_one_thread(story: Callable[[World], None]) -> None:
    """Run a story on one rank that leaves the other core alone."""

    def told(world: World) -> None:
        torch.set_num_threads(1)
        story(world)

    run_local_ranks(told, ranks=1, device="cpu")


def dense_run(
    run_dir: Path, dense: Path, tokens: Path, how: Training, domains: Sequence[str] = SLIMPAJAMA
) -> dict[str, Any]:
    """The configuration of a dense model's training."""
    return settings(DENSE, run_dir, dense, tokens, how, seed=0, domains=domains)


def collect(metrics: Path) -> dict[str, Any]:
    """Losses of a finished run."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    judged = [line for line in lines if "loss/validation" in line]
    prefix = "loss/validation/"
    return {
        "validation": [
            [line["step"] * STEP_TOKENS, round(line["loss/validation"], 5)] for line in judged
        ],
        "training": [round(line["loss/lm"], 4) for line in lines if line["step"]],
        "domains": {
            name.removeprefix(prefix): round(loss, 5)
            for name, loss in judged[-1].items()
            if name.startswith(prefix)
        },
    }


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_suffix(".partial")
    staged.write_text(json.dumps(result) + "\n")
    staged.replace(path)
