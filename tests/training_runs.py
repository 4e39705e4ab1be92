"""Whole training runs in a test: a tiny model, a token file, the real command on forked ranks."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from layouts import changes
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from ranks import run_on_ranks
from tiny import save_dense

from megatron_moe.checkpoint.folder import step_folder
from megatron_moe.checkpoint.global_tensors import GlobalTensors
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


def tree(run_dir: Path, dense: Path, tokens: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A run's settings as YAML would hold them; ``sections`` are merged into its own."""
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
    for section, values in sections.items():
        settings[section] = {**settings.get(section, {}), **values}
    return settings


@dataclass(frozen=True, slots=True)
class Runs:
    """Runs of a test file: one tiny model and text, and settings that all of them share."""

    root: Path
    source: Path
    tokens: Path
    common: dict[str, dict[str, Any]]

    def settings(self, where: str, layout: str = "1", **sections: dict[str, Any]) -> dict[str, Any]:
        """The settings of the run in folder ``where``, under a layout."""
        _, settings = changes(layout)
        for section, values in (*self.common.items(), *sections.items()):
            settings[section] = {**settings.get(section, {}), **values}
        return tree(self.root / where, self.source, self.tokens, **settings)

    def train(
        self, where: str, layout: str = "1", **sections: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """Train, and return the lines of metrics.jsonl."""
        settings = self.settings(where, layout, **sections)
        return run_training(settings, world_size=changes(layout)[0])

    def tensors(self, where: str, step: int) -> dict[str, torch.Tensor]:
        """The tensors of a checkpoint, whole and in fp32, by name."""
        with GlobalTensors(step_folder(self.root / where, step)) as stored:
            return {key: stored.read(key, index=None, dtype=torch.float32) for key in stored.names}


def make_runs(
    root: Path, family: str = "llama", common: dict[str, dict[str, Any]] | None = None, **model: Any
) -> Runs:
    """Write a tiny model of this family and a text, for runs with the settings ``common``."""
    dense = save_dense(root / "dense", family, **model)
    return Runs(root, dense, write_tokens(root / "tokens"), common or {})


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
