"""Write one rank's whole state to one file, and read it back into the same boxes.

step_00000010/rank_00003.bin     bytes of the rank's boxes, one after the other
step_00000010/rank_00003.json    a line with the checksum of the rest: a `RankState`

Such a file fits one layout only: another one has other boxes. The files of a checkpoint
(`storage.py`) fit any layout, but a rank needs several of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from megatron_moe.checkpoint.folder import Progress
from megatron_moe.checkpoint.host import on_host
from megatron_moe.checkpoint.names import name_of
from megatron_moe.checkpoint.storage import Boxes
from megatron_moe.errors import CheckpointError
from megatron_moe.hf.checksums import checksum, file_checksum
from megatron_moe.hf.disk import fsync
from megatron_moe.json_text import parse_json

CHUNK_BYTES = 2**24
"""Bytes that are copied from or to a device, or sent to another rank, at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankState:
    """Contents of the JSON file next to a rank's bytes."""

    rank: int
    layout: str
    """Checksum of all that decides which boxes a rank has."""
    base: str
    """Newest checkpoint of the run at the time of writing."""
    boxes: str
    """Checksum of names, dtypes and shapes of the boxes."""
    num_bytes: int
    checksum: str
    progress: Progress


def bytes_file(folder: Path, rank: int) -> Path:
    """Return the path of a rank's bytes."""
    return folder / f"rank_{rank:05d}.bin"


def write_rank_file(
    folder: Path, boxes: Boxes, *, rank: int, layout: str, base: str, progress: Progress
) -> None:
    """Write the two files of a rank into an existing folder, and fsync them."""
    path, digest, size = bytes_file(folder, rank), xxhash.xxh3_64(), 0
    with path.open("wb") as file:
        for tensor in _tensors(boxes):
            for chunk in _bytes_of(tensor).split(CHUNK_BYTES):
                data = on_host(chunk).numpy().data
                digest.update(data)
                size += file.write(data)
    fsync(path)
    state = RankState(
        rank=rank, layout=layout, base=base, boxes=_shapes(boxes), num_bytes=size,
        checksum=digest.hexdigest(), progress=progress,
    )  # fmt: skip
    text = json.dumps(asdict(state))
    path.with_suffix(".json").write_text(f"{checksum(text.encode())}\n{text}")
    fsync(path.with_suffix(".json"))


def read_state(path: Path) -> RankState:
    """Return the contents of a rank's JSON file, after a comparison with all bytes next to it.

    Raises:
        CheckpointError: One of the two files is missing, damaged, or of another rank or step than
            its name says.
    """
    data = path.with_suffix(".bin")
    for file in (path, data):
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
    try:
        state = _state_in(path)
        if file_checksum(data) != (state.num_bytes, state.checksum):
            raise CheckpointError(
                f"{data} is not what was written together with {path.name}: it has another size or "
                "checksum"
            )
    except OSError as error:
        raise CheckpointError(f"cannot read {error.filename}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    step = state.progress.step
    if (path.parent.name, data) != (name_of(step), bytes_file(path.parent, state.rank)):
        raise CheckpointError(
            f"{path} was renamed: it was written for rank {state.rank} and step {step}"
        )
    return state


def _state_in(path: Path) -> RankState:
    digest, _, text = path.read_text().partition("\n")
    if checksum(text.encode()) != digest:
        raise ValueError("it does not have the checksum in its first line")
    values: dict[str, Any] = parse_json(text)
    return RankState(**{**values, "progress": Progress(**values["progress"])})


def read_rank_file(folder: Path, state: RankState, boxes: Boxes) -> None:
    """Fill the boxes in place from a file that `read_state` has checked.

    Raises:
        CheckpointError: The rank has other boxes than the file.
    """
    path = bytes_file(folder, state.rank)
    if _shapes(boxes) != state.boxes:
        raise CheckpointError(
            f"{path} holds other tensors than this job has on rank {state.rank}.\n"
            f"  remove {folder} on all nodes to resume from the newest checkpoint instead"
        )
    with path.open("rb") as file:
        for tensor in _tensors(boxes):
            for chunk in _bytes_of(tensor).split(CHUNK_BYTES):
                host = torch.empty(len(chunk), dtype=torch.uint8)
                file.readinto(host.numpy().data)
                chunk.copy_(host)


def _tensors(boxes: Boxes) -> Iterator[Tensor]:
    for held in boxes.values():
        for box in held:
            yield box.tensor.detach()


def _bytes_of(tensor: Tensor) -> Tensor:
    """Return the bytes of a box as a view; boxes are runs of consecutive elements."""
    return tensor.view(-1).view(torch.uint8)


def _shapes(boxes: Boxes) -> str:
    shapes = [
        (key, str(box.tensor.dtype), tuple(box.offset), tuple(box.tensor.shape))
        for key, held in boxes.items()
        for box in held
    ]
    return checksum(repr(shapes).encode())
