"""Checkpoint folders on disk: names, which is newest, which go. No tensors here.

run.dir/checkpoints/step_00000010/    complete, or not there: it is renamed into place
run.dir/checkpoints/latest            the newest name, replaced in one step
.../step_00000010/checkpoint.json     step, samples, place in each domain, plan hash, layout
.../step_00000010/config.yaml         the run's resolved configuration
.../step_00000010/plan.safetensors     where the plan is more than its settings
.../step_00000010/dense/              config.json and tokenizer of the dense model
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_moe.config.load import load
from megatron_moe.config.run import Dense, RunConfig
from megatron_moe.errors import CheckpointError
from megatron_moe.experts.file import PLAN_FILE, read_plan
from megatron_moe.experts.plan import ExpertPlan, make_expert_plan
from megatron_moe.hf.disk import fsync
from megatron_moe.hf.spec import DenseSpec

_STEP = re.compile(r"step_(\d{8,})")
DENSE_FILES = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json",
               "added_tokens.json", "vocab.json", "merges.txt", "chat_template*")  # fmt: skip
"""What of a dense folder makes the export complete: everything but the weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What checkpoint.json says."""

    step: int
    samples: int
    plan_hash: str
    optimizer_updates: int
    """Updates of the weights, which Adam counts; a skipped step makes none."""
    world_size: int
    precision: str
    blend: dict[str, Any]
    """Place in each domain, and the weights they are drawn by (`BlendState.to_json`)."""


def step_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def newest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run; None when it has none yet."""
    pointer = run_dir / "checkpoints" / "latest"
    if not pointer.exists():
        return None
    name = pointer.read_text().strip()
    folder = pointer.parent / name
    if not _STEP.fullmatch(name):
        raise CheckpointError(
            f"{pointer} names {name!r}, which is no checkpoint beside it (step_00000010).\n"
            f"  name one in {pointer}, or remove {pointer} to start the run anew"
        )
    if not (folder / "checkpoint.json").exists():
        if (replaced_by(folder) / "checkpoint.json").exists():  # killed while it was replaced
            return replaced_by(folder)
        raise CheckpointError(
            f"{pointer} names {folder.name}, but {folder} is not a complete checkpoint.\n"
            f"  name another in {pointer}, or remove {pointer} to start the run anew"
        )
    return folder


def complete(run_dir: Path) -> list[Path]:
    """Every complete checkpoint of a run, the oldest first."""
    found = (run_dir / "checkpoints").glob("step_*/checkpoint.json")
    named = [file.parent for file in found if _STEP.fullmatch(file.parent.name)]
    return sorted(named, key=lambda folder: int(folder.name.removeprefix("step_")))


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a run folder or a checkpoint folder means.

    Raises:
        CheckpointError: Neither.
    """
    if (path / "checkpoint.json").exists():
        return path
    found = newest(path)
    if found is None:
        raise CheckpointError(
            f"{path} is neither a checkpoint (no checkpoint.json) nor a run with one "
            "(no checkpoints/latest)"
        )
    return found


def read_progress(folder: Path) -> Progress:
    """What checkpoint.json of a complete checkpoint says."""
    try:
        return Progress(**json.loads((folder / "checkpoint.json").read_text()))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / 'checkpoint.json'} is damaged: {error}") from error


def read_config(folder: Path) -> RunConfig:
    """The configuration of the run that wrote the checkpoint."""
    return load(RunConfig, folder / "config.yaml")


def run_of(source: Path, overrides: Iterable[str] = ()) -> tuple[Path, RunConfig]:
    """The checkpoint that ``source`` means, and the configuration to read it with.

    Args:
        source: A run folder (its newest checkpoint is taken) or a checkpoint folder.
        overrides: Settings that win over the run's, such as another layout.

    Raises:
        CheckpointError: No checkpoint there.
        ConfigError: Overrides that are no settings.
    """
    checkpoint = find_checkpoint(source).resolve()
    here = f"run.dir={json.dumps(str(checkpoint.parents[1]))}"  # wherever the run lies by now
    config = load(RunConfig, checkpoint / "config.yaml", [here, *overrides])
    if not (config.dense.path / "config.json").exists():  # the shape and the tokenizer are here too
        config = config.model_copy(update={"dense": Dense(path=checkpoint / "dense")})
    return checkpoint, config


def plan_of(folder: Path, spec: DenseSpec, config: RunConfig) -> ExpertPlan:
    """The expert plan of the run, with the tables it needed, as the checkpoint keeps them."""
    plan = make_expert_plan(spec, config.moe, config.upcycle)
    if plan.recipe.needs_measuring or plan.recipe.needs_weights:
        return read_plan(folder / PLAN_FILE, plan, source=None)
    return plan


def partial_of(final: Path) -> Path:
    """Where a checkpoint lies while it is written."""
    return final.with_name(f".{final.name}.partial")


def replaced_by(final: Path) -> Path:
    """Where a checkpoint lies while another of the same step takes its place."""
    return final.with_name(f".{final.name}.replaced")


def start_folder(final: Path) -> Path:
    """An empty folder beside ``final`` to write into; leftovers of killed saves go first."""
    partial = partial_of(final)
    for leftover in final.parent.glob(".step_*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def give_up(partial: Path) -> None:
    """Remove what a failed save has written: the space is the next one's."""
    shutil.rmtree(partial, ignore_errors=True)


def describe(partial: Path, progress: Progress, config_yaml: str, dense_folder: Path) -> None:
    """Write the small files of a checkpoint."""
    (partial / "config.yaml").write_text(config_yaml)
    (partial / "dense").mkdir()
    for pattern in DENSE_FILES:
        for file in dense_folder.glob(pattern):
            shutil.copyfile(file, partial / "dense" / file.name)
    if (plan := partial.parents[1] / PLAN_FILE).exists():
        shutil.copyfile(plan, partial / PLAN_FILE)
    (partial / "checkpoint.json").write_text(json.dumps(asdict(progress), indent=2) + "\n")


def publish(partial: Path, final: Path) -> None:
    """Make a written checkpoint count: to the disk, to its name, to ``latest``, in this order."""
    for file in sorted(partial.rglob("*")):
        fsync(file)
    fsync(partial)
    replaced = replaced_by(final)
    if final.exists():  # a resumed run saves a step that it saved before
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    partial.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)
    pointer = final.parent / "latest"
    staged = pointer.with_name(".latest.partial")
    staged.write_text(final.name + "\n")
    fsync(staged)
    staged.replace(pointer)
    fsync(final.parent)


def prune(run_dir: Path, keep: int) -> list[Path]:
    """Remove all but the ``keep`` newest checkpoints; returns what went.

    Steps after the one ``latest`` names are of a future that the operator went back from. They do
    not count and stay, until the run saves these steps again.
    """
    steps = {
        int(found[1]): folder
        for folder in (run_dir / "checkpoints").iterdir()
        if (found := _STEP.fullmatch(folder.name))
    }
    latest = newest(run_dir)
    last = max(steps, default=0) if latest is None else int(latest.name.removeprefix("step_"))
    gone = [steps[step] for step in sorted(steps) if step <= last][:-keep]
    for folder in gone:
        shutil.rmtree(folder)
    return gone
