"""Models, tokens and settings of the checks: random, of one seed, made once a run.

<folder>/tiny, <folder>/tiny-other    dense Llamas of 4 layers, fp32, as the tests make them
<folder>/tokens, <folder>/held-out    token files of random documents
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any, Literal

from gpu_checks.session import Session
from megatron_moe.cli.start import resolved
from megatron_moe.config.load import build
from megatron_moe.config.run import RunConfig
from megatron_moe.hf.spec import read_spec
from megatron_moe.rules.check import check
from megatron_moe.runtime.engine import Engine, engine_before_forking

ROOT = Path(__file__).parents[2]
LLAMA_1B = {
    "layers": 16, "hidden": 2048, "ffn": 8192, "heads": 32, "kv_heads": 8, "vocab": 128256,
    "tie_word_embeddings": True, "head_dim": 64,
}  # fmt: skip
"""Shape of Llama-3.2-1B."""
SMALL = {"layers": 2, "hidden": 64, "ffn": 128, "heads": 8, "kv_heads": 2, "vocab": 512,
         "tie_word_embeddings": True, "head_dim": 8}  # fmt: skip
"""Shape used in a rehearsal."""


def prepare(session: Session) -> None:
    """Write the dense models and token files that the other checks read."""
    sys.path[:0] = [str(ROOT / "tests")]
    from megatron_moe.runtime import cpu

    cpu.install()
    from tiny import save_dense
    from training_runs import write_tokens

    save_dense(session.folder / "tiny")
    save_dense(session.folder / "tiny-other", seed=1)
    write_tokens(session.folder / "tokens")
    write_tokens(session.folder / "held-out", documents=4, seed=1)


def tiny_config(session: Session, folder: str, /, **changes: dict[str, Any]) -> RunConfig:
    """Return a legal run of the tiny model on the check's device.

    Args:
        session: The check.
        folder: Name of the run's folder, which is created.
        changes: Settings by section, merged into the run's.
    """
    settings: dict[str, dict[str, Any]] = {
        "run": {"dir": str(session.folder / folder), "device": session.device},
        "source": {"path": str(session.folder / "tiny")},
        "moe": {"num_moe_experts": 4},
        "data": {"path": str(session.folder / "tokens"), "seq_length": 32},
        "train": {"steps": 10, "global_batch_size": 4, "precision": "fp32"},
        "optimizer": {"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 1},
        "checkpoint": {"interval": 1000},
        "upcycle": {"verify": "never"},
        "log": {"tensorboard": False},
    }
    return legal(merged(settings, changes))


def shape_config(session: Session, folder: str, /, **changes: dict[str, Any]) -> RunConfig:
    """Return a legal run of the Llama-3.2-1B shape, of which only a config.json exists.

    ``changes`` may hold ``shape``: sizes of the dense model that differ.
    """
    sys.path[:0] = [str(ROOT / "bench")]
    from dense import config_of  # bench/dense.py

    sizes: dict[str, Any] = {**session.size(LLAMA_1B, SMALL), **changes.pop("shape", {})}
    dense = session.folder / f"shape-{sizes['layers']}"
    dense.mkdir(exist_ok=True)
    (dense / "config.json").write_text(json.dumps(config_of(**sizes)))
    settings: dict[str, dict[str, Any]] = {
        "run": {"dir": str(session.folder / folder), "device": session.device},
        "source": {"path": str(dense)},
        "moe": {"num_moe_experts": 4},
        "data": {"path": "none", "seq_length": session.size(4096, 64)},
        "train": {"steps": 1000, "global_batch_size": session.size(8, 2), "precision": "bf16"},
        "optimizer": {"warmup_steps": 1},
        "upcycle": {"verify": "never"},
        "log": {"tensorboard": False},
    }
    return legal(merged(settings, changes))


def merged(
    settings: dict[str, dict[str, Any]], changes: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return the settings with ``changes`` merged into their sections."""
    sections = dict.fromkeys([*settings, *changes])
    return {name: {**settings.get(name, {}), **changes.get(name, {})} for name in sections}


def legal(settings: dict[str, Any]) -> RunConfig:
    """Return the configuration of one rank with its engine chosen, and create its folder.

    Raises:
        ConfigError: A rule is violated.
    """
    config = build(RunConfig, settings)
    config = resolved(config, _engine(config.run.device))
    check(config, read_spec(config.source.path), 1)
    config.run.dir.mkdir(parents=True, exist_ok=True)
    return config


@cache
def _engine(device: Literal["cpu", "cuda"]) -> Engine:
    """Return the layers that run.engine auto means here: looking may take another process."""
    return engine_before_forking("auto", device)
