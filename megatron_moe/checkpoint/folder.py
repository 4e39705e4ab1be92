"""Manage checkpoint folders: name, find, publish and prune them. This module reads no tensors.

run.dir/checkpoints/step_00000010/    complete or absent, because it is renamed into place
run.dir/checkpoints/latest            name of the newest checkpoint, replaced atomically
.../step_00000010/CHECKSUMS           checksums of all files below (none in version 0.1)
.../step_00000010/checkpoint.json     step, samples, position in each domain, plan hash, layout
.../step_00000010/config.yaml         the run's resolved configuration
.../step_00000010/plan.safetensors    tables of the plan, if its settings alone do not define it
.../step_00000010/source/             config.json and tokenizer of the source (once: dense/)
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_moe.checkpoint.names import (
    STEP,
    complete_in,
    name_of,
    named_in,
    names_back,
    renamed,
    step_in_name,
)
from megatron_moe.config.load import load
from megatron_moe.config.moe import Source
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import CheckpointError
from megatron_moe.experts.file import PLAN_FILE, read_plan
from megatron_moe.experts.plan import ExpertPlan, make_expert_plan
from megatron_moe.hf.checksums import FILE as CHECKSUMS
from megatron_moe.hf.checksums import Checksums, read_checksums
from megatron_moe.hf.disk import fsync, replacing, write_text
from megatron_moe.hf.source_files import source_files
from megatron_moe.hf.spec import ModelSpec
from megatron_moe.json_text import parse_json
from megatron_moe.regular_file import obstacle, regular


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Contents of checkpoint.json."""

    step: int
    samples: int
    plan_hash: str
    optimizer_updates: int
    """Weight updates, as counted by Adam; a skipped step makes none."""
    updates_by_role: dict[str, int] | None = None
    """Weight updates of each part that the last step trained, by `Part.label`; None: all parts are
    alike."""
    world_size: int
    precision: str
    tokens: int | None = None
    """Tokens consumed. None: a checkpoint of version 0.1, all of whose samples had one length."""
    blend: dict[str, Any]
    """Position in each domain, and the domains' sampling weights (`BlendState.to_json`)."""
    balance: dict[str, float] | None = None
    """Coefficients of the load-balancing losses by MoE layer; None: they do not adapt."""
    unused_steps: dict[str, list[int]] | None = None
    """Consecutive steps in which each expert got no tokens, by MoE layer; None: not counted."""


def step_folder(run_dir: Path, step: int) -> Path:
    """Return the folder of the checkpoint of ``step``."""
    return run_dir / "checkpoints" / name_of(step)


def newest(run_dir: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, or None if there is none yet.

    Raises:
        CheckpointError: ``latest`` cannot be read, or does not name a complete checkpoint.
    """
    pointer = run_dir / "checkpoints" / "latest"
    if (what := obstacle(pointer)) is not None:
        raise CheckpointError(
            f"{pointer} must be a text file with the name of a checkpoint (step_00000010), but is "
            f"{what}.\n  move it away and {_another_name(pointer)}"
        )
    if not pointer.exists():
        return None
    try:
        name = pointer.read_text(errors="replace").strip()
    except OSError as error:
        raise CheckpointError(f"cannot read {pointer}: {error.strerror}") from error
    folder = pointer.parent / name
    if not STEP.fullmatch(name):
        raise CheckpointError(
            f"{pointer} names {name!r}, which is not a checkpoint next to it (step_00000010).\n"
            f"  {_another_name(pointer)}"
        )
    if not (folder / "checkpoint.json").exists():
        if (replaced_by(folder) / "checkpoint.json").exists():  # killed during replacement
            return replaced_by(folder)
        raise CheckpointError(
            f"{pointer} names {folder.name}, but {folder} is not a complete checkpoint.\n"
            f"  {_another_name(pointer)}"
        )
    return folder


def _another_name(pointer: Path) -> str:
    """Return what to do about a ``latest`` that names no checkpoint."""
    if not (others := complete_in(pointer.parent)):
        return f"remove {pointer} to restart the run: there is no other checkpoint"
    return (
        f"write another name into {pointer}, such as {others[-1].name}, or remove {pointer} to "
        "restart the run"
    )


def complete(run_dir: Path) -> list[Path]:
    """Return all complete checkpoints of a run, oldest first."""
    return complete_in(run_dir / "checkpoints")


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """Return the folders with the name of a checkpoint, damaged ones too, oldest first."""
    return named_in(run_dir / "checkpoints")


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint folder that ``path`` is, or the newest checkpoint of the run there.

    Raises:
        CheckpointError: ``path`` is neither a checkpoint nor a run with one, or is damaged.
    """
    checkpoint = path if (path / "checkpoint.json").exists() else newest(path)
    if checkpoint is None:
        raise CheckpointError(
            f"{path} is neither a checkpoint (no checkpoint.json) nor a run with one "
            "(no checkpoints/latest)"
        )
    check_small_files(checkpoint)
    read_progress(checkpoint)
    return checkpoint


def check_small_files(folder: Path) -> None:
    """Compare all files of a checkpoint with their checksums, if there are any.

    Tensors and their index are left out: whoever reads them checks them.

    Raises:
        CheckpointError: A file has changed since it was written.
    """
    try:
        if (checksums := checksums_of(folder)) is not None:
            for name in checksums.blocks:
                if name != ".metadata" and not name.endswith(".distcp"):
                    checksums.check_file(name)
    except CheckpointError as error:
        raise with_way_out(error, folder) from None


def checksums_of(folder: Path) -> Checksums | None:
    """Return the checksums of a checkpoint; None: version 0.1 wrote it, without any.

    Raises:
        CheckpointError: ``CHECKSUMS`` is damaged or missing.
    """
    checksums = read_checksums(folder)
    if checksums is None and read_progress(folder).tokens is not None:  # 0.1 counted no tokens
        raise CheckpointError(
            f"{folder / CHECKSUMS} is missing, so nothing tells whether other files have changed "
            "since they were written"
        )
    return checksums


def with_way_out(error: CheckpointError, folder: Path) -> CheckpointError:
    """Return the error of a checkpoint that cannot be read, with another one to use instead."""
    latest = folder.parent / "latest"
    if not STEP.fullmatch(folder.name):  # not one of ours, or moved away from its run
        return error
    wrong = {folder, *renamed(folder.parent)}
    others = [path for path in complete_in(folder.parent) if path not in wrong]
    older = [path for path in others if step_in_name(path) < step_in_name(folder)] or others
    way_out = f"remove {latest} to restart the run: there is no other checkpoint"
    if older:
        way_out = f"write {older[-1].name} into {latest} to resume from it"
    return CheckpointError(f"{error}\n  {way_out}")


def read_progress(folder: Path) -> Progress:
    """Read checkpoint.json of a complete checkpoint.

    Raises:
        CheckpointError: It is damaged, the folder has the name of another step, or the checkpoint
            has been removed meanwhile.
    """
    progress = _progress_in(folder)
    if STEP.fullmatch(folder.name) and progress.step != step_in_name(folder):
        raise CheckpointError(
            f"{folder} must hold the checkpoint of the step in its name, but its checkpoint.json "
            f"is of step {progress.step}: folders were renamed, swapped or copied over each other."
            f"\n  {names_back(folder.parent)}"
        )
    return progress


def _progress_in(folder: Path) -> Progress:
    try:
        return Progress(**parse_json(regular(folder / "checkpoint.json").read_text()))
    except FileNotFoundError:
        if folder.is_dir():
            raise CheckpointError(
                f"{folder} is not a complete checkpoint: it has no checkpoint.json"
            ) from None
        raise CheckpointError(
            f"{folder} has been removed while it was read: a running job keeps only its newest "
            "checkpoints (checkpoint.keep).\n  run the command again, or raise checkpoint.keep"
        ) from None
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"cannot read {folder / 'checkpoint.json'}: {reason}") from error
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / 'checkpoint.json'} is damaged: {error}") from error


def tokens_of(progress: Progress, folder: Path) -> int:
    """Return the tokens consumed up to a checkpoint."""
    if progress.tokens is not None:
        return progress.tokens
    return progress.samples * read_config(folder).data.seq_length


def read_config(folder: Path) -> RunConfig:
    """Read the configuration of the run that wrote the checkpoint.

    Raises:
        CheckpointError: A small file of the checkpoint has changed since it was written.
    """
    check_small_files(folder)
    return load(RunConfig, folder / "config.yaml", from_checkpoint=True)


def source_copy(checkpoint: Path) -> Path:
    """Return the checkpoint's folder with the source's config.json and tokenizer files.

    Checkpoints of version 0.1 call it ``dense``.
    """
    old = checkpoint / "dense"
    return old if old.is_dir() else checkpoint / "source"


def run_of(source: Path, overrides: Iterable[str] = ()) -> tuple[Path, RunConfig]:
    """Return the checkpoint at ``source`` and the configuration to read it with.

    Args:
        source: A run folder, whose newest checkpoint is used, or a checkpoint folder.
        overrides: Settings that override those of the run, such as another layout.

    Raises:
        CheckpointError: There is no checkpoint at ``source``.
        ConfigError: An override is not a valid setting.
    """
    checkpoint = in_its_run(find_checkpoint(source))
    run_dir = f"run.dir={json.dumps(str(checkpoint.parents[1]))}"  # the run may have been moved
    settings = [run_dir, *overrides]
    config = load(RunConfig, checkpoint / "config.yaml", settings, from_checkpoint=True)
    if not (config.source.path / "config.json").exists():  # the checkpoint has copies
        config = config.model_copy(update={"source": Source(path=source_copy(checkpoint))})
    return checkpoint, config


def in_its_run(checkpoint: Path) -> Path:
    """Return the absolute path of a checkpoint, with its run as the second parent.

    A checkpoint that was moved to another disk, with a link left behind, stays one of its run.
    """
    if STEP.fullmatch(checkpoint.name) and checkpoint.parent.name == "checkpoints":
        return checkpoint.parent.resolve() / checkpoint.name
    return checkpoint.resolve()


def plan_of(folder: Path, spec: ModelSpec, config: RunConfig) -> ExpertPlan:
    """Return the expert plan of the run, with its tables as stored in the checkpoint, if any."""
    plan = make_expert_plan(spec, config.moe, config.upcycle)
    if plan.needs != "nothing":
        return read_plan(folder / PLAN_FILE, plan, source=None)
    return plan


def partial_of(final: Path) -> Path:
    """Return the folder that a checkpoint is written into before it is published."""
    return final.with_name(f".{final.name}.partial")


def replaced_by(final: Path) -> Path:
    """Return the folder that holds a checkpoint while another of the same step replaces it."""
    return final.with_name(f".{final.name}.replaced")


def start_folder(final: Path) -> Path:
    """Remove leftovers of killed saves; create and return an empty folder next to ``final``."""
    partial = partial_of(final)
    for leftover in final.parent.glob(".step_*.partial"):
        _remove(leftover)
    partial.mkdir(parents=True)
    return partial


def give_up(partial: Path) -> None:
    """Remove the files of a failed save, to free the space for the next one."""
    shutil.rmtree(partial, ignore_errors=True)


def describe(partial: Path, progress: Progress, config_yaml: str, source_folder: Path) -> None:
    """Write the small files of a checkpoint: everything but its tensors."""
    (partial / "config.yaml").write_text(config_yaml)
    (partial / "source").mkdir()
    kept = partial.parents[1] / "source"
    _copy_source_files(kept if kept.is_dir() else source_folder, partial / "source")
    if (plan := partial.parents[1] / PLAN_FILE).exists():
        shutil.copyfile(plan, partial / PLAN_FILE)
    (partial / "checkpoint.json").write_text(json.dumps(asdict(progress), indent=2) + "\n")


def keep_source_files(run_dir: Path, source_folder: Path) -> Path:
    """Copy the files of a source that checkpoints hold into the run, and return that folder.

    Saves then depend on no folder that another user may change or remove during the run.
    """
    kept = run_dir / "source"
    if source_folder.resolve() != kept.resolve():
        staged = run_dir / ".source.partial"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        _copy_source_files(source_folder, staged)
        for file in staged.iterdir():
            fsync(file)
        shutil.rmtree(kept, ignore_errors=True)
        staged.rename(kept)
    return kept


def keep_plan(run_dir: Path, checkpoint: Path) -> str:
    """Let the run have the plan of the checkpoint, because saves copy the run's.

    Returns:
        What was done, for the log; empty if the plan was there.
    """
    plan, kept = checkpoint / PLAN_FILE, run_dir / PLAN_FILE
    if not plan.exists() or (kept.exists() and filecmp.cmp(plan, kept, shallow=False)):
        return ""
    other = kept.with_name(f"{PLAN_FILE}.other")
    was = (
        f"was not that of the checkpoint, and is now {other.name}" if kept.exists() else "was gone"
    )
    if kept.exists():
        kept.replace(other)
    with replacing(kept) as staged:
        shutil.copyfile(plan, staged)
    return f"{kept} {was}; the plan of {checkpoint.name} is in its place"


def _copy_source_files(source: Path, target: Path) -> None:
    for file in source_files(source):
        shutil.copyfile(file, target / file.name)


def publish(partial: Path, final: Path) -> None:
    """Publish a written checkpoint: fsync it, rename it, then update ``latest``, in this order."""
    for file in sorted(partial.rglob("*")):
        fsync(file)
    fsync(partial)
    replaced = replaced_by(final)
    if os.path.lexists(final):  # a resumed run may save a step again
        _remove(replaced)
        final.rename(replaced)
    partial.rename(final)
    _remove(replaced)
    write_text(final.parent / "latest", final.name + "\n")


def _remove(path: Path) -> None:
    """Remove a folder, or whatever has its name; of a link to another disk, only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def prune(run_dir: Path, keep: int) -> list[Path]:
    """Remove all but the ``keep`` newest checkpoints; return the removed folders.

    Checkpoints newer than ``latest`` are left over from a timeline that the operator abandoned.
    They are neither counted nor removed, until the run saves these steps again.
    """
    steps = {
        int(match[1]): folder
        for folder in (run_dir / "checkpoints").iterdir()
        if (match := STEP.fullmatch(folder.name))
    }
    latest = newest(run_dir)
    last = max(steps, default=0) if latest is None else step_in_name(latest)
    removed = [steps[step] for step in sorted(steps) if step <= last][:-keep]
    for folder in removed:
        _remove(folder)
    return removed
