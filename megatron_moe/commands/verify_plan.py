"""Verify a plan file and its solved matrices: both are compared with the hashes in the file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_moe.checkpoint.folder import complete
from megatron_moe.errors import CheckpointError
from megatron_moe.experts.file import PLAN_FILE, check_plan, is_plan_file
from megatron_moe.experts.solved import check_solved, plan_of_folder, solved_file, solved_folder
from megatron_moe.hf.checksums import Checksums, read_checksums


def plan_at(path: Path) -> Path | None:
    """Return the plan file that a path names: itself, or the one whose matrices a folder holds.

    Raises:
        CheckpointError: The plan file of a folder of matrices, which has their hashes, is missing.
    """
    if path.is_file():
        return path if is_plan_file(path) or _may_be_damaged_plan(path) else None
    plan = plan_of_folder(path)
    if plan is None or not path.is_dir():
        return None
    if not plan.is_file():
        raise CheckpointError(
            f"{path} holds matrices of {plan}, which is missing and has their hashes.\n"
            "  restore it, or run megatron-moe construct again"
        )
    return plan


def _may_be_damaged_plan(path: Path) -> bool:
    """Return whether a file that is not known as a plan has the name of one."""
    if path.suffix != ".safetensors" or path.match("model*.safetensors"):
        return False
    owner = plan_of_folder(path.parent)
    return owner is None or not owner.is_file()  # else it is a matrix of that plan


def files_of_plan(plan: Path) -> list[Path]:
    """Return a plan file and those files of its solved matrices that are there."""
    folder = solved_folder(plan)
    files = [folder / name for name in _names_of_plan(plan)]
    return [plan, *(path for path in files if path.is_file())]


def unlisted_of_plan(plan: Path) -> list[str]:
    """Return what the folder of a plan's matrices holds besides them, such as an older plan's."""
    own = set(_names_of_plan(plan))
    return sorted(path.name for path in solved_folder(plan).glob("*") if path.name not in own)


def _names_of_plan(plan: Path) -> list[str]:
    try:
        layers = check_plan(plan)
    except CheckpointError:
        return []
    return [solved_file(solved_folder(plan), layer).name for layer in layers]


def problems_of_plan(plan: Path, seen: Callable[[int], None]) -> Iterator[str]:
    """Yield what is damaged or missing.

    Args:
        plan: The file.
        seen: Called with the bytes of each file that was read.
    """
    try:
        down = check_plan(plan)
    except CheckpointError as error:
        yield f"{error}.\n  nothing of {solved_folder(plan)} could be compared with its hashes"
        return
    seen(plan.stat().st_size)
    folder = solved_folder(plan)
    for layer, digest in down.items():
        try:
            check_solved(folder, layer, digest)
        except CheckpointError as error:
            yield str(error)
        else:
            seen(solved_file(folder, layer).stat().st_size)


def problems_of_runs_plan(run_dir: Path) -> Iterator[str]:
    """Yield how ``RUN/plan.safetensors`` differs from what the newest checkpoint copied of it.

    Without a checkpoint, or if its ``CHECKSUMS`` is damaged, the hashes in the file are checked.
    """
    for folder in reversed(complete(run_dir)):
        try:
            checksums = read_checksums(folder)
        except CheckpointError:
            continue
        if checksums is not None and PLAN_FILE in checksums.blocks:
            own = Checksums(run_dir, {PLAN_FILE: checksums.blocks[PLAN_FILE]})
            try:
                own.check_file(PLAN_FILE)
            except CheckpointError as error:
                yield str(error)
            return
    try:
        check_plan(run_dir / PLAN_FILE)
    except CheckpointError as error:
        yield str(error)
