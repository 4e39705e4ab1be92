"""A run's folder as a report needs it.

A part that is not there is None; one that is damaged is told on the page, where its reader looks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_moe.analyze.record import Analysis
from megatron_moe.checkpoint.folder import newest, read_progress
from megatron_moe.config.load import load
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import ConfigError, UserError
from megatron_moe.experts.recipe import moe_layer_ids
from megatron_moe.hf.spec import DenseSpec, read_spec
from megatron_moe.report.history import History, read_history
from megatron_moe.report.records import Evaluation, TaskScores, read_records


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFiles:
    """What lies in ``run.dir``."""

    path: Path
    config: RunConfig
    config_text: str
    history: History
    receipt: dict[str, Any] | None
    evaluations: list[Evaluation]
    tasks: list[TaskScores]
    analyses: list[Analysis]
    spec: DenseSpec | None
    """The dense model's shape, where its config.json is still to be found."""
    world_size: int | None
    """Ranks of the newest checkpoint's job, else of the one that upcycled."""
    wrong: list[str]
    """What could not be read, and why."""

    @property
    def name(self) -> str:
        """What the run is called."""
        return self.path.resolve().name

    @property
    def moe_layers(self) -> tuple[int, ...] | None:
        """Ids of the MoE layers, counted from 0."""
        return None if self.spec is None else moe_layer_ids(self.config.moe, self.spec.num_layers)

    @property
    def domain_colours(self) -> dict[str, int]:
        """A place in the palette for every domain, the same in all pictures."""
        told = [*(self.config.data.domains or {})]
        told += [name for one in self.evaluations for name in one.domains]
        told += [name for one in self.analyses for name in one.domains]
        return {name: place for place, name in enumerate(dict.fromkeys(told))}

    def layer_names(self, count: int) -> list[str]:
        """Names of ``count`` rows, one a MoE layer: their ids, or places where these are unknown.

        What is told of another number of layers was trained under another configuration.
        """
        known = self.moe_layers
        ids = known if known is not None and len(known) == count else range(count)
        return [str(layer) for layer in ids]


def read_run(folder: Path) -> RunFiles:
    """Everything a run has left so far; it may still be running.

    Raises:
        ConfigError: The folder is no run's.
        DataError: metrics.jsonl cannot be read.
    """
    if not (folder / "config.yaml").exists():
        raise ConfigError(
            f"{folder} is no run: it has no config.yaml.\n"
            "  name the run.dir of a job that `megatron-moe train` started"
        )
    config = load(RunConfig, folder / "config.yaml")
    wrong: list[str] = []
    receipt = _receipt(folder / "receipt.json", wrong)
    checkpoint = _newest(folder, wrong)
    evaluations, *damaged = read_records(folder / "evaluation", Evaluation)
    tasks, *damaged_tasks = read_records(folder / "evaluation", TaskScores, "tasks-*.json")
    analyses, *damaged_analyses = read_records(folder / "analysis", Analysis)
    history = read_history(folder / "metrics.jsonl")
    if history.damaged:
        wrong.append(f"metrics.jsonl: {history.damaged} damaged lines are left out")
    return RunFiles(
        path=folder,
        config=config,
        config_text=(folder / "config.yaml").read_text(encoding="utf-8"),
        history=history,
        receipt=receipt,
        evaluations=evaluations,
        tasks=tasks,
        analyses=analyses,
        spec=_spec(config, checkpoint),
        world_size=_world_size(receipt, checkpoint),
        wrong=[*wrong, *chain(*damaged, *damaged_tasks, *damaged_analyses)],
    )


def _receipt(path: Path, wrong: list[str]) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        found["ranks"][0]["bytes_read"]
    except (ValueError, KeyError, TypeError, IndexError):
        wrong.append("receipt.json is damaged and not shown")
        return None
    return found


def _newest(folder: Path, wrong: list[str]) -> Path | None:
    try:
        return newest(folder)
    except UserError as error:
        wrong.append(str(error).splitlines()[0])
        return None


def _spec(config: RunConfig, checkpoint: Path | None) -> DenseSpec | None:
    """From the copy that every checkpoint carries, else from the dense model."""
    for folder in ([checkpoint / "dense"] if checkpoint else []) + [config.dense.path]:
        if (folder / "config.json").exists():
            return read_spec(folder)
    return None


def _world_size(receipt: dict[str, Any] | None, checkpoint: Path | None) -> int | None:
    if checkpoint is not None:
        return read_progress(checkpoint).world_size
    return None if receipt is None else len(receipt["ranks"])
