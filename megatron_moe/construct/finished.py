"""Record which layers a fit has finished, so that a killed `construct` can resume.

key          hash of settings and source; files of another key are deleted
00003.json   layer 3: router rows, hash of its solved matrix, and its `LayerFit`

These files are in the working folder of `megatron_moe.construct.place`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_moe.hf.disk import write_text


@dataclass(frozen=True, slots=True)
class FinishedLayer:
    """Everything about a finished layer that its plan cannot derive."""

    router_ED: NDArray[np.float32] | None
    down_hash: str | None
    fit: dict[str, Any]


def start(folder: Path, key: str) -> None:
    """Prepare the folder on rank 0; all ranks must call this."""
    if dist.get_rank() == 0:
        file = folder / "key"
        if not (file.exists() and file.read_text() == key):
            shutil.rmtree(folder, ignore_errors=True)
            write_text(file, key)
    dist.barrier()


def write_finished(folder: Path, layer: int, finished: FinishedLayer) -> None:
    """Record a layer on rank 0; the file appears when it is complete. All ranks must call this."""
    if dist.get_rank() == 0:
        rows = None if finished.router_ED is None else finished.router_ED.tolist()
        record = {"router_ED": rows, "down_hash": finished.down_hash, "fit": finished.fit}
        write_text(_file(folder, layer), json.dumps(record))
    dist.barrier()


def read_finished(folder: Path, layer: int) -> FinishedLayer | None:
    """Return the record of a layer, or None if it is not finished."""
    path = _file(folder, layer)
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    rows = record["router_ED"]
    record["router_ED"] = None if rows is None else np.array(rows, dtype=np.float32)
    return FinishedLayer(**record)


def remove_records(folder: Path) -> None:
    """Delete the records of a complete fit; solved matrices stay."""
    for path in [*folder.glob("*.json"), folder / "key"]:
        path.unlink(missing_ok=True)


def _file(folder: Path, layer: int) -> Path:
    return folder / f"{layer:05}.json"
