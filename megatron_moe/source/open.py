"""Read a model that Megatron-Core trained as if it were a Hugging Face folder.

``source.path`` holds config.json and the tokenizer as usual, but the files of a ``torch_dist``
checkpoint instead of safetensors. Each Hugging Face tensor consists of rows of a global tensor::

    qkv   | q q k v | q q k v | ..      query groups, one by one   k_proj = every 4th head
    fc1   | gate ......... | up ....... |                           up_proj = the second half

All experts of a MoE layer are one global tensor, with an axis for the expert.

Rows are copied from memory-mapped chunks (a chunk is what one rank wrote), so only the rows that a
rank needs are read from the files. The chunks of the last tensors stay mapped, because all experts
of a layer read from the same tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from megatron_moe.checkpoint.global_tensors import GlobalTensors
from megatron_moe.checkpoint.keys import checkpoint_key
from megatron_moe.checkpoint.mapped import MappedTensor
from megatron_moe.errors import CheckpointError
from megatron_moe.hf.header import INDEX_FILE, SINGLE_FILE, TensorInfo
from megatron_moe.hf.names import (
    ROWS,
    Row,
    Scope,
    Sharding,
    in_source,
    shapes_of,
    source_names,
    source_sizes,
)
from megatron_moe.hf.reader import Selected, SourceCheckpoint, open_safetensors
from megatron_moe.hf.spec import ModelSpec, read_spec

INDEX = ".metadata"
KEPT_TENSORS = 2
"""Number of tensors whose chunks stay memory-mapped: fc1 and fc2 of one layer."""


def open_source(folder: Path) -> SourceCheckpoint:
    """Open the model in ``folder``: safetensors, or Megatron-Core's distributed checkpoint.

    Raises:
        CheckpointError: As in `open_safetensors`, or the folder holds both formats, or adapters.
    """
    if not (folder / INDEX).exists():
        return open_safetensors(folder)
    if any((folder / file).exists() for file in (SINGLE_FILE, INDEX_FILE)):
        raise CheckpointError(
            f"{folder} must hold one model, but it holds safetensors and a distributed checkpoint "
            f"({INDEX}).\n"
            "  move one of them to its own folder, with config.json and the tokenizer"
        )
    spec, source = read_spec(folder), GlobalTensors(folder)
    if any(".adapter." in name for name in source.names):
        raise CheckpointError(
            f"{folder} holds adapters (lora.rank), which are not read: its weights alone are not "
            "the trained model.\n"
            "  export the run with megatron-moe export, and use that folder"
        )
    locations = dict(_locations(spec, source))
    tensors = {name: location.info(folder / INDEX) for name, location in locations.items()}
    return DistributedSource(folder, spec, tensors, source=source, locations=locations)


def open_moments(folder: Path, spec: ModelSpec, moment: str) -> DistributedSource:
    """Open a moment of every parameter of a checkpoint's model, under the names of its tensors.

    Args:
        folder: Checkpoint of a run.
        spec: Shape of its model, a MoE.
        moment: Name of the moment, such as ``exp_avg``; empty for the weights.

    Raises:
        CheckpointError: The checkpoint's tensors are those of another model.
    """
    experts = spec.experts
    if moment and experts is not None:  # biases are not trained by the optimizer
        experts = replace(experts, moe_router_enable_expert_bias=False)
    spec, source = replace(spec, experts=experts), GlobalTensors(folder)
    prefix = f"optimizer.{moment}." if moment else ""
    locations = dict(_locations(spec, source, prefix))
    tensors = {name: location.info(folder / INDEX) for name, location in locations.items()}
    return DistributedSource(folder, spec, tensors, source=source, locations=locations)


def has_weights(folder: Path) -> bool:
    """Return whether ``folder`` holds weights that `open_source` may be able to open."""
    return any((folder / file).exists() for file in (INDEX, SINGLE_FILE, INDEX_FILE))


@dataclass(frozen=True, slots=True)
class _Location:
    """Location of the rows of a Hugging Face tensor in a global tensor."""

    key: str
    index: int | None
    """Index into the first axis, if all layers or all experts of a layer are one tensor."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int = 0
    """Row of the global tensor that corresponds to row 0."""
    run: int | None = None
    """Number of consecutive rows per run; None if all rows are consecutive."""
    stride: int = 0
    """Rows from the start of one run to the start of the next."""

    def info(self, file: Path) -> TensorInfo:
        return TensorInfo(self.shape, self.dtype, file, 0)

    def rows(self, wanted: slice | Tensor) -> Tensor:
        """Convert rows of the Hugging Face tensor to rows of the global tensor."""
        if isinstance(wanted, slice):
            wanted = torch.arange(wanted.start, wanted.stop)
        if self.run is None:
            return wanted + self.start
        return self.start + wanted // self.run * self.stride + wanted % self.run


@dataclass(slots=True, kw_only=True)
class DistributedSource(SourceCheckpoint):
    """A checkpoint that reads slices from the chunks of global tensors."""

    source: GlobalTensors
    locations: Mapping[str, _Location]
    _kept: dict[tuple[str, int | None], dict[tuple[int, ...], MappedTensor]] = field(
        default_factory=dict, init=False
    )

    def fingerprint(self) -> str:
        """Return a hash that identifies the model: its tensors and the first bytes of each file."""
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
        location = self.locations[name]
        rows_R, filled = location.rows(selection.rows), 0
        for chunk in self.source.chunks(location.key, index=location.index):
            first, size = (chunk.offsets, chunk.sizes)
            skip = 0 if location.index is None else 1
            here_R = (rows_R >= first[skip]) & (rows_R < first[skip] + size[skip])
            if not here_R.any():
                continue
            whole = len(first) == skip + 1 or size[skip + 1] == self._width(location)
            target = here_R.nonzero()[:, 0]
            if whole:
                values = self._chunk(location, chunk).rows(rows_R[here_R] - first[skip])
                values = values if selection.columns is None else values[:, selection.columns]
                into.index_copy_(0, target.to(into.device), values.to(into.device, into.dtype))
                filled += values.numel()
                continue
            columns_C = _column_indices(selection.columns, self._width(location))
            left, right = first[skip + 1], first[skip + 1] + size[skip + 1]
            here_C = (columns_C >= left) & (columns_C < right)
            if here_C.any():
                values = self._chunk(location, chunk).rows(rows_R[here_R] - first[skip])
                values = values[:, columns_C[here_C] - left].to(into.device, into.dtype)
                at_C = here_C.nonzero()[:, 0]
                into[target.to(into.device)[:, None], at_C.to(into.device)] = values
                filled += values.numel()
        if filled != into.numel():
            raise CheckpointError(
                f"{location.key} in {self.folder} has only {filled} of "
                f"{into.numel()} elements of {name}"
            )
        if not into.isfinite().all():
            raise CheckpointError(
                f"{name} must be finite, but {location.key} in {self.folder} holds NaN or infinite "
                "values"
            )
        self.bytes_read += into.numel() * location.dtype.itemsize

    def _width(self, location: _Location) -> int:
        return location.shape[1] if len(location.shape) == 2 else 1

    def _chunk(self, location: _Location, chunk: ChunkStorageMetadata) -> MappedTensor:
        """Map a chunk, or only the part of it at this index, and keep it mapped."""
        tensor = (location.key, location.index)
        if tensor not in self._kept:
            while len(self._kept) >= KEPT_TENSORS:
                del self._kept[next(iter(self._kept))]
            self._kept[tensor] = {}
        kept, offsets = self._kept[tensor], tuple(chunk.offsets)
        if offsets not in kept:
            values = self.source.mapped(location.key, chunk)
            kept[offsets] = (
                values if location.index is None else values.at(location.index - offsets[0])
            )
        return kept[offsets]


def _column_indices(columns: slice | Tensor | None, width: int) -> Tensor:
    if columns is None:
        return torch.arange(width)
    return torch.arange(width)[columns] if isinstance(columns, slice) else columns


def _locations(
    spec: ModelSpec, source: GlobalTensors, prefix: str = ""
) -> list[tuple[str, _Location]]:
    """Return the location of every Hugging Face tensor in the checkpoint, with its name.

    Names of the global tensors begin with ``prefix``.
    """
    locations, problems = [], []
    for row, layer, expert in _source_parts(spec):
        located = _locate(row, layer, expert, source, prefix)
        if located is None:
            continue  # check_tensors reports missing tensors
        key, index = located
        size, dtype = source.shape_and_dtype(key)
        size = size if index is None else size[1:]
        if not _fits(row, size, spec):
            expected = _fused_shape(row, spec)
            problems.append(f"    {key} has shape {size}, but config.json requires {expected}")
            continue
        routed = spec.experts is not None and layer in spec.experts.moe_layers
        for part, template in enumerate(source_names(row, routed)):
            location = _part(row, part, spec, _Location(key, index, (), dtype))
            locations.append((template.format(layer=layer, expert=expert), location))
    if problems:
        raise CheckpointError(
            f"{source.folder} must hold the tensors that its config.json describes.\n"
            + "\n".join(problems)
        )
    return locations


def _source_parts(spec: ModelSpec) -> Iterator[tuple[Row, int | None, int | None]]:
    """Yield the rows of a source model, with layer and expert of each of its parameters."""
    for row in ROWS:
        experts = range(source_sizes(spec).get("E", 0)) if row.scope is Scope.EXPERT else (None,)
        for layer in (None,) if row.scope is Scope.MODEL else range(spec.num_layers):
            if in_source(row, spec, layer or 0):
                for expert in experts:
                    yield row, layer, expert


def _locate(
    row: Row, layer: int | None, expert: int | None, source: GlobalTensors, prefix: str
) -> tuple[str, int | None] | None:
    """Return the key of a row's global tensor, and the index in a stack of layers or experts."""
    if expert is not None:
        key = prefix + checkpoint_key(row, layer=layer, moe_layer=True)
        return (key, expert) if key in source else None
    for template in (prefix + name for name in row.megatron):
        if (key := template.format(layer=layer)) in source:
            return key, None
        stacked = template.replace("layers.{layer}.", "layers.")
        if layer is not None and stacked in source:
            return stacked, layer
    return None


def _fused_shape(row: Row, spec: ModelSpec) -> tuple[int, ...]:
    shapes = shapes_of(row, spec, **source_sizes(spec))
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _fits(row: Row, size: tuple[int, ...], spec: ModelSpec) -> bool:
    expected = _fused_shape(row, spec)
    if row.sharding is Sharding.VOCABULARY:  # may be padded
        return size[0] >= expected[0] and size[1:] == expected[1:]
    return size == expected


def _part(row: Row, part: int, spec: ModelSpec, whole: _Location) -> _Location:
    """Return the location of part ``part`` of a fused tensor."""
    shapes = shapes_of(row, spec, **source_sizes(spec))
    shape = shapes[part]
    if row.sharding is Sharding.QKV:
        runs = [s[0] // spec.num_query_groups for s in shapes]
        start, run, stride = sum(runs[:part]), runs[part], sum(runs)
    else:
        start, run, stride = sum(s[0] for s in shapes[:part]), None, 0
    return _Location(whole.key, whole.index, shape, whole.dtype, start, run, stride)
