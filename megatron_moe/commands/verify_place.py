"""Tell what a path to verify holds, and refuse what cannot be verified."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from megatron_moe.checkpoint.folder import checkpoint_folders
from megatron_moe.errors import CheckpointError
from megatron_moe.experts.file import is_plan_file
from megatron_moe.experts.solved import plan_of_folder
from megatron_moe.hf.checksums import FILE
from megatron_moe.regular_file import regular

_OF_CHECKPOINT = (".metadata", "checkpoint.json")
_OF_MODEL = (FILE, "config.json", "model.safetensors.index.json")
_MOST_NEAR = 5


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder has files that only checkpoints of a run have."""
    names = any(os.path.lexists(folder / name) for name in _OF_CHECKPOINT)
    return names or any(folder.glob("*.distcp")) or folder in _neighbors(folder)


def _neighbors(folder: Path) -> list[Path]:
    return checkpoint_folders(folder.parents[1]) if len(folder.parents) > 1 else []


def is_one_folder(folder: Path) -> bool:
    """Return whether a folder is a checkpoint or a model, and not a run with checkpoints in it."""
    names = any(os.path.lexists(folder / name) for name in _OF_MODEL)
    return names or is_checkpoint(folder) or any(folder.glob("model*.safetensors"))


def is_run(folder: Path) -> bool:
    """Return whether a folder holds checkpoints, or a pointer to one."""
    pointer = folder / "checkpoints" / "latest"
    return bool(checkpoint_folders(folder)) or os.path.lexists(pointer)


def check_place(path: Path) -> None:
    """Check that there is a folder or a file at a path, and that it can be read.

    Raises:
        CheckpointError: There is none, or it is a pipe, a socket or a device.
    """
    try:
        regular(path)
        if path.is_dir():
            os.listdir(path)
    except FileNotFoundError as error:
        raise CheckpointError(_nothing_at(path)) from error
    except OSError as error:
        raise CheckpointError(f"cannot verify {path}: {error.strerror or error}") from error


def _nothing_at(path: Path) -> str:
    if path.is_symlink():
        return f"{path} is a link to {os.readlink(path)}, which does not exist"
    parent = next((above for above in path.parents if above.is_dir()), Path())
    wanted = path.parts[len(parent.parts)] if parent.parts else path.parts[0]
    try:
        names = sorted(entry.name for entry in parent.iterdir() if entry.is_dir())
    except OSError:
        names = []
    near = difflib.get_close_matches(wanted, names, n=_MOST_NEAR, cutoff=0.6)
    hint = f"; near it: {', '.join(str(parent / name) for name in near)}" if near else ""
    if not near and names and parent != Path("/"):
        more = " ..." if len(names) > _MOST_NEAR else ""
        hint = f"; {parent} holds the folders {', '.join(names[:_MOST_NEAR])}{more}"
    return f"there is nothing at {path}.\n  check the path{hint}"


def why_unverifiable(path: Path) -> str:
    """Return why a path that exists cannot be verified, and what can be."""
    if path.is_file():
        if (plan := plan_of_folder(path.parent)) is not None and plan.is_file():
            return f"{path} is a part of a plan.\n  verify the plan: {plan}"
        return (
            f"{path} is a file that is not a plan.\n"
            f"  to verify a file of a checkpoint or of a model, verify its folder: {path.parent}"
        )
    if checkpoint_folders(path.parent) and path.name == "checkpoints":
        return f"{path} is a part of a run.\n  verify the run: {path.parent}"
    if not any(path.iterdir()):
        return f"{path} is an empty folder: there is nothing to verify"
    if (path / "checkpoints").is_dir() or (path / "receipt.json").exists():
        return f"{path} is a run without a checkpoint: there is nothing to verify yet"
    return (
        f"{path} is neither a run with checkpoints, nor a checkpoint (no checkpoint.json), "
        "nor a Hugging Face folder (no config.json), nor a plan file or its folder"
        f"{_inside(path)}"
    )


def _inside(folder: Path) -> str:
    """Return what a folder holds that can be verified, in words."""
    inside = sorted(folder.iterdir())
    able = [
        str(path)
        for path in inside
        if (is_one_folder(path) or is_run(path) if path.is_dir() else is_plan_file(path))
    ]
    return f".\n  verify what is in it: {', '.join(able[:_MOST_NEAR])}" if able else ""
