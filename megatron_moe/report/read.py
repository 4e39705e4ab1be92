"""Read the files of a run's folder for a report.

Missing parts are None; damaged parts are listed on the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_moe.analyze.record import Analysis
from megatron_moe.checkpoint.folder import Progress, newest, read_progress, source_copy
from megatron_moe.config.load import load
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import ConfigError, UserError
from megatron_moe.experts.resolve import moe_layer_ids
from megatron_moe.hf.spec import ModelSpec, read_spec
from megatron_moe.json_text import parse_json
from megatron_moe.report.history import History, read_history
from megatron_moe.report.records import Evaluation, TaskScores, read_records


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFiles:
    """Contents of ``run.dir``."""

    path: Path
    config: RunConfig
    config_text: str
    history: History
    receipt: dict[str, Any] | None
    evaluations: list[Evaluation]
    tasks: list[TaskScores]
    analyses: list[Analysis]
    spec: ModelSpec | None
    """Shape of the dense model, if its config.json still exists."""
    world_size: int | None
    """World size of the newest checkpoint's job, or else of the job that upcycled."""
    problems: list[str]
    """Messages about files that could not be read."""

    @property
    def name(self) -> str:
        """Name of the run: its folder's name."""
        return self.path.resolve().name

    @property
    def moe_layers(self) -> tuple[int, ...] | None:
        """Ids of the MoE layers, counted from 0."""
        return None if self.spec is None else moe_layer_ids(self.config.moe, self.spec.num_layers)

    @property
    def domain_colors(self) -> dict[str, int]:
        """Palette index of each domain, the same in all pictures."""
        names = [*(self.config.data.domains or {})]
        names += [name for evaluation in self.evaluations for name in evaluation.domains]
        names += [name for analysis in self.analyses for name in analysis.domains]
        return {name: index for index, name in enumerate(dict.fromkeys(names))}

    def layer_names(self, count: int) -> list[str]:
        """Return the names of ``count`` MoE layers: their ids, or 0 to count - 1 if unknown.

        Values for another number of layers come from training with another configuration.
        """
        known = self.moe_layers
        ids = known if known is not None and len(known) == count else range(count)
        return [str(layer) for layer in ids]


def read_run(folder: Path) -> RunFiles:
    """Read all files that a run has written so far; it may still be running.

    Raises:
        ConfigError: The folder is not a run directory.
        DataError: metrics.jsonl cannot be read.
    """
    if not (folder / "config.yaml").exists():
        raise ConfigError(
            f"{folder} is not a run directory: it has no config.yaml.\n"
            "  pass the run.dir of a job that `megatron-moe train` started"
        )
    config = load(RunConfig, folder / "config.yaml", from_checkpoint=True)
    problems: list[str] = []
    receipt = _receipt(folder / "receipt.json", problems)
    checkpoint, progress = _newest(folder, problems)
    evaluations, *damaged = read_records(folder / "evaluation", Evaluation)
    tasks, *damaged_tasks = read_records(folder / "evaluation", TaskScores, "tasks-*.json")
    analyses, *damaged_analyses = read_records(folder / "analysis", Analysis)
    history = read_history(folder / "metrics.jsonl")
    if history.damaged:
        problems.append(f"metrics.jsonl: {history.damaged} damaged lines were skipped")
    last = 0 if progress is None else progress.step
    if missing := history.missing(last=last):
        problems.append(f"metrics.jsonl lacks lines of steps that the run has taken: {missing}")
    problems += _of_abandoned_steps([*evaluations, *tasks, *analyses], history, last)
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
        world_size=_world_size(receipt, progress),
        problems=[*problems, *chain(*damaged, *damaged_tasks, *damaged_analyses)],
    )


def _of_abandoned_steps(
    records: Sequence[Evaluation | TaskScores | Analysis], history: History, last: int
) -> list[str]:
    """Return a message for results of steps that the run went back from and has not taken again."""
    last = max(last, history.last_step)
    steps = sorted({record.step for record in records if record.step and record.step > last})
    if not (steps and last):
        return []
    return [
        f"evaluation/ or analysis/ has results of steps {', '.join(map(str, steps))}, but the run "
        f"is at step {last}: they are of steps that were taken before it went back"
    ]


def _receipt(path: Path, problems: list[str]) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        receipt = parse_json(path.read_text(encoding="utf-8"))
        receipt["ranks"][0]["bytes_read"]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        problems.append("receipt.json is not shown: it is damaged")
        return None
    return receipt


def _newest(folder: Path, problems: list[str]) -> tuple[Path, Progress] | tuple[None, None]:
    """Return the newest checkpoint and its checkpoint.json; add what is wrong with it, if it is."""
    try:
        checkpoint = newest(folder)
        return (None, None) if checkpoint is None else (checkpoint, read_progress(checkpoint))
    except UserError as error:
        problems.append(str(error).splitlines()[0])
        return None, None


def _spec(config: RunConfig, checkpoint: Path | None) -> ModelSpec | None:
    """Read the shape from the checkpoint's copy of config.json, or else from the dense model."""
    for folder in ([source_copy(checkpoint)] if checkpoint else []) + [config.source.path]:
        if (folder / "config.json").exists():
            return read_spec(folder)
    return None


def _world_size(receipt: dict[str, Any] | None, progress: Progress | None) -> int | None:
    if progress is not None:
        return progress.world_size
    return None if receipt is None else len(receipt["ranks"])
