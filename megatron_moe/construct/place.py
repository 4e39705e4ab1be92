"""Choose where `construct` works, and replace a plan only when the new one is complete.

::

    runs/plan.safetensors            the plan
    runs/plan.down/                  its solved matrices
    runs/.plan.safetensors.fitting/  the next plan: layers that are solved so far
    runs/.plan.safetensors.replaced/ matrices of the previous plan while the next one takes over

A plan is a file and a folder, which no file system renames together. So the new plan is completed
in the working folder first, and `publish` renames in an order that it can finish later.
"""

from __future__ import annotations

import re
import secrets
import shutil
from pathlib import Path

from megatron_moe.config.run import RunConfig
from megatron_moe.construct.finished import remove_records
from megatron_moe.errors import ConfigError
from megatron_moe.experts.file import PLAN_FILE, is_plan_file
from megatron_moe.experts.solved import plan_file, solved_folder
from megatron_moe.hf.disk import fsync, make_folder, refusal

_OURS = re.compile(r"\d{5,}\.(safetensors|json)|key|plan\.safetensors|\..*\.partial-\w+")
"""Files in a folder of solved matrices, also those of a killed `construct`."""


def working_folder(path: Path) -> Path:
    """Return the folder in which the next plan is completed."""
    return path.with_name(f".{path.name}.fitting")


def partial_folder(path: Path) -> Path:
    """Return the folder of partial measurements."""
    return path.with_name(f".{path.name}.measuring")


def publish(path: Path) -> None:
    """Replace the plan by the one that is complete in the working folder, if there is one.

    After an interruption at any point, another call finishes what was begun. Only between the first
    renaming and the last, the old plan is refused, with the advice to construct it again.
    """
    working, solved = working_folder(path), solved_folder(path)
    replaced = path.with_name(f".{path.name}.replaced")
    if (working / PLAN_FILE).exists():
        remove_records(working)
        if solved.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            solved.rename(replaced)
        working.rename(solved)
        fsync(path.parent)
    if (solved / PLAN_FILE).exists():
        (solved / PLAN_FILE).replace(path)
        fsync(path.parent)
    if solved.is_dir() and not any(solved.iterdir()):  # that of a plan without solved matrices
        solved.rmdir()
    shutil.rmtree(replaced, ignore_errors=True)


def check_place(config: RunConfig) -> None:
    """Refuse an ``upcycle.plan`` that cannot be written, or that would replace other files.

    Raises:
        ConfigError: It is a folder, a file that is no plan, or a path that cannot be created.
    """
    assert config.upcycle.plan is not None
    named = f"upcycle.plan ({config.upcycle.plan})"
    try:
        path = plan_file(config.upcycle.plan)
        reason = _occupied(path, config)
        if reason is None:
            make_folder(path.parent, f"the folder of {named}")
            _try_to_write(path)
    except RuntimeError as error:  # links in a circle
        reason = str(error)
    except OSError as error:
        reason = refusal(error, config.upcycle.plan.parent)
    if reason is not None:
        raise ConfigError(
            f"{named} must be a file that megatron-moe construct can write: {reason}.\n"
            "  choose another file, such as upcycle.plan=runs/plan.safetensors"
        )


def _occupied(path: Path, config: RunConfig) -> str | None:
    """Return what at this path must not be replaced, or None."""
    solved, run_dir = solved_folder(path), config.run.dir.absolute()
    if path.is_dir():
        return "it is a folder"
    if path.suffix == ".down":
        return "folders of solved matrices have names in .down"
    if path.absolute() in (run_dir, *run_dir.parents):
        return f"run.dir ({config.run.dir}) is to be a folder at this path"
    if path.exists() and not is_plan_file(path):
        return "a file that is no plan is there, and would be lost"
    if not solved.exists():
        return None
    if not solved.is_dir():
        return f"{solved}, the folder of its solved matrices, is a file"
    foreign = [file.name for file in solved.iterdir() if not _OURS.fullmatch(file.name)]
    if foreign:
        return f"{solved}, the folder of its solved matrices, also holds {foreign[0]}"
    return None


def _try_to_write(path: Path) -> None:
    """Create and remove a file with the longest name that will be needed there."""
    trial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    trial.touch()
    trial.unlink()
