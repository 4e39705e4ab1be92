"""Count the bytes that a rank would read from a dense checkpoint, without reading them.

A folder with only a ``config.json`` is enough, because it determines every tensor's shape. A known
model needs no folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_moe.errors import CheckpointError
from megatron_moe.hf.dtypes import OF_CONFIG
from megatron_moe.hf.header import INDEX_FILE, SINGLE_FILE, TensorInfo, read_headers
from megatron_moe.hf.names import dense_tensors
from megatron_moe.hf.planned import config_to_plan, spec_to_plan
from megatron_moe.hf.reader import Selected, SourceCheckpoint


@dataclass(slots=True)
class UnreadCheckpoint(SourceCheckpoint):
    """Count the bytes of each selection in ``bytes_read`` without changing the destination."""

    def _copy(self, name: str, info: TensorInfo, pairs: Sequence[tuple[Selected, Tensor]]) -> None:
        self.bytes_read += sum(into.numel() for _, into in pairs) * info.dtype.itemsize


def open_unread(folder: Path) -> UnreadCheckpoint:
    """Open the dense model in ``folder`` by its headers, or by its shape if it has no weights.

    Raises:
        CheckpointError: See `open_safetensors`. Also if there are no weights and config.json
            has no supported dtype.
    """
    spec, _ = spec_to_plan(folder)
    if any((folder / file).exists() for file in (SINGLE_FILE, INDEX_FILE)):
        return UnreadCheckpoint(folder, spec, read_headers(folder))
    dtype = _stored_dtype(folder)
    absent = folder / SINGLE_FILE
    tensors = {name: TensorInfo(shape, dtype, absent, 0) for name, shape in dense_tensors(spec)}
    return UnreadCheckpoint(folder, spec, tensors)


def _stored_dtype(folder: Path) -> torch.dtype:
    config = config_to_plan(folder)
    name = config.get("dtype") or config.get("torch_dtype") or "float32"  # as in transformers
    if name not in OF_CONFIG:
        raise CheckpointError(
            f"{folder / 'config.json'} has dtype {name!r}, and there are no safetensors to read it "
            f"from: must be one of {', '.join(OF_CONFIG)}"
        )
    return OF_CONFIG[name]
