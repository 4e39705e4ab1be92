"""Store solved ``down`` matrices next to a plan file, one file a layer, and read slices of them.

    runs/plan.safetensors           tables, with the hash of each file below
    runs/plan.down/00003.safetensors  layer 3: ``(N, D)``, one row per neuron

Rows are the neurons of expert 0, of expert 1, ..., and of the shared expert, each in the plan's
order. A rank reads the rows of its own experts.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from megatron_moe.errors import CheckpointError
from megatron_moe.hf.disk import replacing
from megatron_moe.regular_file import regular

_NAME = "down_ND"


def solved_folder(plan: Path) -> Path:
    """Return the folder of a plan file's solved matrices, which no other plan file shares.

    A link to a plan file has the folder of the file. The names of folders differ in more than the
    suffix too, because ``q.down`` belongs to ``q.safetensors``.

    >>> solved_folder(Path("runs/q.safetensors")).name, solved_folder(Path("runs/q.k2")).name
    ('q.down', 'q.k2.solved')
    """
    file = plan_file(plan)
    if file.suffix == ".safetensors":
        return file.with_suffix(".down")
    return file.with_name(f"{file.name}.solved")


def plan_of_folder(solved: Path) -> Path | None:
    """Return the plan file of a folder of solved matrices; None if its name says it is none."""
    if solved.suffix == ".down":
        return solved.with_suffix(".safetensors")
    return solved.with_suffix("") if solved.suffix == ".solved" else None


def plan_file(plan: Path) -> Path:
    """Return the file behind a link, and any other path as it is."""
    return plan.resolve() if plan.is_symlink() else plan


def solved_file(folder: Path, layer: int) -> Path:
    """Return the file of one layer."""
    return folder / f"{layer:05}.safetensors"


def write_solved(folder: Path, layer: int, down_ND: NDArray[np.float32]) -> str:
    """Write the matrix of one layer, and return its hash; the file appears when it is complete."""
    path = solved_file(folder, layer)
    with replacing(path) as staged:
        save_file({_NAME: np.ascontiguousarray(down_ND)}, staged)
    return file_hash(path)


def file_hash(path: Path) -> str:
    """Return the sha256 of a file.

    Raises:
        CheckpointError: The file cannot be read.
    """
    try:
        with regular(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}, a part of the plan: {error.strerror}.\n"
            "  restore the folder next to the plan file, or run megatron-moe construct again"
        ) from error


def check_solved(folder: Path, layer: int, expected: str) -> None:
    """Compare the file of one layer with its hash in the plan.

    Raises:
        CheckpointError: The file is missing or changed.
    """
    path = solved_file(folder, layer)
    if (actual := file_hash(path)) != expected:
        raise CheckpointError(
            f"{path} is damaged, or belongs to another plan: it has sha256 {actual[:12]}, but the "
            f"plan file has {expected[:12]}.\n  run megatron-moe construct again"
        )


def read_solved(folder: Path, layer: int, rows: slice) -> NDArray[np.float32]:
    """Return rows of the matrix of one layer, ``(rows, D)``.

    Raises:
        CheckpointError: The file is missing or not readable.
    """
    path = solved_file(folder, layer)
    try:
        with safe_open(regular(path), "np") as file:
            return file.get_slice(_NAME)[rows.start : rows.stop]
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}, a part of the plan: {error}") from error
