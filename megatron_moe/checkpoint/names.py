"""Names of checkpoint folders: read them, and find folders that have the name of another step."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from megatron_moe.json_text import parse_json

STEP = re.compile(r"step_(\d{8,})")


def name_of(step: int) -> str:
    """Return the name of the folder with the checkpoint of ``step``.

    >>> name_of(10)
    'step_00000010'
    """
    return f"step_{step:08d}"


def step_in_name(folder: Path) -> int:
    """Return the step that a folder is named after."""
    return int(folder.name.removeprefix("step_"))


def named_in(checkpoints: Path) -> list[Path]:
    """Return the folders with the name of a checkpoint, damaged ones too, by their steps."""
    folders = checkpoints.glob("step_*/")
    return sorted((path for path in folders if STEP.fullmatch(path.name)), key=step_in_name)


def complete_in(checkpoints: Path) -> list[Path]:
    """Return the complete checkpoints in a folder of checkpoints, by the steps in their names."""
    return [path for path in named_in(checkpoints) if (path / "checkpoint.json").exists()]


def renamed(checkpoints: Path) -> dict[Path, str]:
    """Return the folders that have the name of another step than theirs, with their right names."""
    names = {}
    for path in complete_in(checkpoints):
        with suppress(OSError, ValueError, TypeError, KeyError):  # damaged, which its reader says
            right = name_of(parse_json((path / "checkpoint.json").read_text())["step"])
            if right != path.name:
                names[path] = right
    return names


def names_back(checkpoints: Path) -> str:
    """Return in words how to give renamed checkpoints the names of their steps."""
    wrong = renamed(checkpoints)
    ways = []
    for path, name in wrong.items():
        target = checkpoints / name
        if target.exists() and target not in wrong:
            ways.append(f"remove {path.name}, because there is another checkpoint {name}")
        else:
            ways.append(f"rename {path.name} to {name}")
    return (
        f"{'; '.join(ways)}; then write the name of the checkpoint to resume from into "
        f"{checkpoints / 'latest'}"
    )
