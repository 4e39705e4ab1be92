"""Whole training runs in a test: a tiny model, a token file, the real command on forked ranks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from ranks import run_on_ranks

from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.hf.spec import read_spec
from megatron_moe.rules.check import check
from megatron_moe.runtime.world import World


def write_tokens(
    prefix: Path, *, vocab_size: int = 257, documents: int = 20, length: int = 300, seed: int = 0
) -> Path:
    """A Megatron token file of random documents."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(documents):
        tokens = torch.randint(0, vocab_size, (length,), generator=generator)
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def tree(run_dir: Path, dense: Path, tokens: Path, **changes: dict[str, Any]) -> dict[str, Any]:
    """A run's settings as YAML would hold them; ``changes`` are merged into the sections."""
    settings: dict[str, dict[str, Any]] = {
        "run": {"dir": str(run_dir), "device": "cpu"},
        "source": {"path": str(dense)},
        "moe": {"num_moe_experts": 4},
        "data": {"path": str(tokens), "seq_length": 32},
        "train": {"steps": 5, "global_batch_size": 4, "precision": "fp32"},
        "optimizer": {"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 1},
        "log": {"tensorboard": False},
        "upcycle": {"verify": "never"},
    }
    for section, values in changes.items():
        settings[section] = {**settings.get(section, {}), **values}
    return settings


def run_training(settings: dict[str, Any], *, world_size: int) -> list[dict[str, Any]]:
    """Run ``megatron-moe train`` on forked ranks; returns the lines of metrics.jsonl."""
    config = build(RunConfig, settings)
    check(config, read_spec(config.source.path), world_size)
    config.run.dir.mkdir(parents=True, exist_ok=True)
    run_on_ranks(_train, config, world_size=world_size)
    return read_metrics(config.run.dir)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def _train(world: World, config: RunConfig) -> None:
    from megatron_moe.commands.train import train

    train(config, world)
