"""Verify ``checkpoints/latest`` of a run, from which a resume starts."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_moe.checkpoint.folder import complete, newest
from megatron_moe.errors import CheckpointError


def problem_of_latest(run_dir: Path) -> str | None:
    """Return why a resume would not start from a checkpoint, and how to change that."""
    pointer, checkpoints = run_dir / "checkpoints" / "latest", complete(run_dir)
    if not os.path.lexists(pointer):
        if not checkpoints:
            return None
        return (
            f"{pointer} is missing: the run would start again at step 0 and replace its "
            f"checkpoints, {', '.join(folder.name for folder in checkpoints)}.\n"
            f"  write {checkpoints[-1].name} into {pointer} to resume from it"
        )
    try:
        newest(run_dir)
    except CheckpointError as error:
        return f"{error}\n  until then, a resume ends with this error"
    return None


def remark_on_latest(run_dir: Path) -> str | None:
    """Return where a resume starts, if that is not the newest complete checkpoint."""
    pointer, checkpoints = run_dir / "checkpoints" / "latest", complete(run_dir)
    start = newest(run_dir)
    if start is None or not checkpoints or checkpoints[-1] == start:
        return None
    if start.name.startswith("."):
        return (
            f"a save was killed while it replaced a checkpoint: a resume starts from {start}, "
            "which is complete"
        )
    newer = [folder.name for folder in checkpoints[checkpoints.index(start) + 1 :]]
    return (
        f"{pointer} names {start.name}, not the newest checkpoint: a resume starts there, and "
        f"replaces {', '.join(newer)} when it reaches these steps. To resume from the newest one, "
        f"write {newer[-1]} into {pointer}"
    )
