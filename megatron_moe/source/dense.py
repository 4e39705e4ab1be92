"""A dense model that Megatron-Core trained, read as if it were a Hugging Face folder.

``dense.path`` holds config.json and the tokenizer as ever, and instead of safetensors the files of
a ``torch_dist`` checkpoint. Each Hugging Face tensor is some rows of one of its global tensors::

    qkv   | q q k v | q q k v | ..      query groups in turn        k_proj = every 4th head
    fc1   | gate ......... | up ....... |                           up_proj = the second half

Rows are copied out of the mapped chunks (what one rank wrote each), so of the files only the rows
that a rank takes are read. Those chunks of the last tensors stay mapped, because the experts of a
layer take from the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from megatron_moe.checkpoint.global_tensors import GlobalTensors
from megatron_moe.checkpoint.mapped import MappedTensor
from megatron_moe.errors import CheckpointError
from megatron_moe.hf.header import INDEX_FILE, SINGLE_FILE, TensorInfo
from megatron_moe.hf.names import MOE_ROLES, ROWS, Row, Sharding, dense_shapes, has_row
from megatron_moe.hf.reader import DenseCheckpoint, Selected, open_dense_checkpoint
from megatron_moe.hf.spec import DenseSpec, read_spec

INDEX = ".metadata"
KEPT_TENSORS = 2
"""Whose chunks stay mapped: fc1 and fc2 of one layer."""


def open_dense(folder: Path) -> DenseCheckpoint:
    """The dense model in ``folder``: safetensors, or a distributed checkpoint of Megatron-Core.

    Raises:
        CheckpointError: As `open_dense_checkpoint`, or both kinds in one folder.
    """
    if not (folder / INDEX).exists():
        return open_dense_checkpoint(folder)
    if any((folder / file).exists() for file in (SINGLE_FILE, INDEX_FILE)):
        raise CheckpointError(
            f"{folder} holds safetensors and a distributed checkpoint ({INDEX}): it must be one "
            "model.\n  move one of them to a folder of its own, with config.json and the tokenizer"
        )
    spec, source = read_spec(folder), GlobalTensors(folder)
    places = dict(_places(spec, source))
    tensors = {name: place.info(folder / INDEX) for name, place in places.items()}
    return DistributedDense(folder, spec, tensors, source=source, places=places)


def has_weights(folder: Path) -> bool:
    """Whether there is anything that `open_dense` may open."""
    return any((folder / file).exists() for file in (INDEX, SINGLE_FILE, INDEX_FILE))


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the rows of a Hugging Face tensor lie in a global tensor."""

    key: str
    layer: int | None
    """Index of the first axis, where the layers of the model are one tensor."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int = 0
    """Row of the global tensor that holds row 0."""
    run: int | None = None
    """Rows that follow each other; None: all of them."""
    stride: int = 0
    """From the start of one run to that of the next."""

    def info(self, file: Path) -> TensorInfo:
        return TensorInfo(self.shape, self.dtype, file, 0)

    def rows(self, wanted: slice | Tensor) -> Tensor:
        """Rows of the global tensor."""
        if isinstance(wanted, slice):
            wanted = torch.arange(wanted.start, wanted.stop)
        if self.run is None:
            return wanted + self.start
        return self.start + wanted // self.run * self.stride + wanted % self.run


@dataclass(slots=True, kw_only=True)
class DistributedDense(DenseCheckpoint):
    """A dense checkpoint whose slices come out of the chunks of global tensors."""

    source: GlobalTensors
    places: Mapping[str, _Place]
    _kept: dict[tuple[str, int | None], dict[tuple[int, ...], MappedTensor]] = field(
        default_factory=dict, init=False
    )

    def fingerprint(self) -> str:
        """A hash that tells dense models apart: their tensors and the first bytes of each file."""
        digest = hashlib.sha256()
        for name, info in sorted(self.tensors.items()):
            digest.update(f"{name} {info.dtype} {info.shape}".encode())
        for path in sorted(self.folder.glob("*.distcp")):
            with path.open("rb") as file:
                digest.update(file.read(4096))
        return digest.hexdigest()

    def _copy(self, name: str, info: TensorInfo, pairs: Sequence[tuple[Selected, Tensor]]) -> None:
        for selection, into in pairs:
            self._copy_one(name, selection, into)

    def _copy_one(self, name: str, selection: Selected, into: Tensor) -> None:
        place = self.places[name]
        rows_R, filled = place.rows(selection.rows), 0
        for chunk in self.source.chunks(place.key, index=place.layer):
            first, size = (chunk.offsets, chunk.sizes)
            skip = 0 if place.layer is None else 1
            here_R = (rows_R >= first[skip]) & (rows_R < first[skip] + size[skip])
            if not here_R.any():
                continue
            whole = len(first) == skip + 1 or size[skip + 1] == self._width(place)
            target = here_R.nonzero()[:, 0]
            if whole:
                values = self._chunk(place, chunk).rows(rows_R[here_R] - first[skip])
                values = values if selection.columns is None else values[:, selection.columns]
                into.index_copy_(0, target.to(into.device), values.to(into.device, into.dtype))
                filled += values.numel()
                continue
            columns_C = _listed(selection.columns, self._width(place))
            left, right = first[skip + 1], first[skip + 1] + size[skip + 1]
            here_C = (columns_C >= left) & (columns_C < right)
            if here_C.any():
                values = self._chunk(place, chunk).rows(rows_R[here_R] - first[skip])
                values = values[:, columns_C[here_C] - left].to(into.device, into.dtype)
                at_C = here_C.nonzero()[:, 0]
                into[target.to(into.device)[:, None], at_C.to(into.device)] = values
                filled += values.numel()
        if filled != into.numel():
            raise CheckpointError(
                f"{place.key} in {self.folder} has {filled} of {into.numel()} numbers of {name}"
            )
        if not into.isfinite().all():
            raise CheckpointError(
                f"{name} must be finite, but {place.key} in {self.folder} holds NaN or infinite "
                "values"
            )
        self.bytes_read += into.numel() * place.dtype.itemsize

    def _width(self, place: _Place) -> int:
        return place.shape[1] if len(place.shape) == 2 else 1

    def _chunk(self, place: _Place, chunk: ChunkStorageMetadata) -> MappedTensor:
        """The chunk's numbers, of the one layer that is asked for."""
        tensor = (place.key, place.layer)
        if tensor not in self._kept:
            while len(self._kept) >= KEPT_TENSORS:
                del self._kept[next(iter(self._kept))]
            self._kept[tensor] = {}
        kept, offsets = self._kept[tensor], tuple(chunk.offsets)
        if offsets not in kept:
            values = self.source.mapped(place.key, chunk)
            kept[offsets] = values if place.layer is None else values.at(place.layer - offsets[0])
        return kept[offsets]


def _listed(columns: slice | Tensor | None, width: int) -> Tensor:
    if columns is None:
        return torch.arange(width)
    return torch.arange(width)[columns] if isinstance(columns, slice) else columns


def _places(spec: DenseSpec, source: GlobalTensors) -> list[tuple[str, _Place]]:
    """Every Hugging Face tensor that the checkpoint holds, by name."""
    found, problems = [], []
    for row in ROWS:
        if row.role in MOE_ROLES or not has_row(row.role, spec):
            continue
        for layer in range(spec.num_layers) if "{layer}" in row.hf[0] else (None,):
            located = _locate(row, layer, source)
            if located is None:
                continue  # check_tensors tells what is missing
            key, index = located
            size, dtype = source.shape_and_dtype(key)
            size = size if index is None else size[1:]
            if not _fits(row, size, spec):
                expected = _fused_shape(row, spec)
                problems.append(f"    {key} is {size}, but config.json promises {expected}")
                continue
            for part, template in enumerate(row.hf):
                place = _part(row, part, spec, _Place(key, index, (), dtype))
                found.append((template.format(layer=layer), place))
    if problems:
        raise CheckpointError(
            f"{source.folder} does not hold the tensors that its config.json promises.\n"
            + "\n".join(problems)
        )
    return found


def _locate(row: Row, layer: int | None, source: GlobalTensors) -> tuple[str, int | None] | None:
    """Global tensor of a row, and the index of its layer where all layers are one tensor."""
    for template in row.megatron:
        if (key := template.format(layer=layer)) in source:
            return key, None
        stacked = template.replace("layers.{layer}.", "layers.")
        if layer is not None and stacked in source:
            return stacked, layer
    return None


def _fused_shape(row: Row, spec: DenseSpec) -> tuple[int, ...]:
    shapes = dense_shapes(row.role, spec)
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _fits(row: Row, size: tuple[int, ...], spec: DenseSpec) -> bool:
    expected = _fused_shape(row, spec)
    if row.sharding is Sharding.VOCABULARY:  # may be padded
        return size[0] >= expected[0] and size[1:] == expected[1:]
    return size == expected


def _part(row: Row, part: int, spec: DenseSpec, whole: _Place) -> _Place:
    """The rows of part ``part`` of a fused tensor."""
    shapes = dense_shapes(row.role, spec)
    shape = shapes[part]
    if row.sharding is Sharding.QKV:
        runs = [s[0] // spec.num_query_groups for s in shapes]
        start, run, stride = sum(runs[:part]), runs[part], sum(runs)
    else:
        start, run, stride = sum(s[0] for s in shapes[:part]), None, 0
    return _Place(whole.key, whole.layer, shape, whole.dtype, start, run, stride)
