"""Compute which slice of which source tensor a rank holds, by arithmetic; no other code does.

A local parameter is a stack of pieces. Each is a rectangle of one source tensor: the rows and
columns to read, and the rows of the local parameter to fill. Upcycling reads exactly these.

Shape letters of this module:

    D  hidden_size   F  ffn_hidden_size (dense)   M  neurons of one expert   V  vocab_size
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_moe.hf.names import Row, Scope, Sharding, shapes_of, source_names, source_sizes
from megatron_moe.hf.spec import ModelSpec

Selection = slice | NDArray[np.int64] | None
"""Consecutive indices, a list of indices, or all of them."""


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A rectangle of one source tensor, and the rows of the local parameter that it fills."""

    source: str
    rows: Selection
    columns: Selection
    into: slice

    @property
    def key(self) -> tuple:
        """Key that is equal for pieces with the same values from the same tensor."""
        return (self.source, *(_hashable(s) for s in (self.rows, self.columns)))


def _hashable(selection: Selection) -> object:
    return selection.tobytes() if isinstance(selection, np.ndarray) else str(selection)


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """Index of one of ``size`` equal shards: a rank's position in its tensor-parallel group."""

    rank: int
    size: int

    def slice_of(self, length: int) -> slice:
        """Return this shard's slice of ``length`` consecutive items.

        >>> ShardIndex(1, 4).slice_of(8)
        slice(2, 4, None)
        """
        share = length // self.size
        return slice(self.rank * share, (self.rank + 1) * share)


def pieces(
    row: Row,
    *,
    layer: int | None,
    part: ShardIndex,
    spec: ModelSpec,
    neurons_M: Selection = None,
    expert: int | None = None,
) -> list[Piece]:
    """Return the pieces of source tensors that make up one local parameter.

    Args:
        row: The parameter's row of the name table.
        layer: Global layer id, for the source's name.
        part: Index of the shard in the group that shards the parameter: tp, or etp for an expert.
        spec: The source model.
        neurons_M: For an expert, the source neurons it consists of; None takes all of them.
        expert: For an expert of a MoE source, the source expert that has these neurons.

    Returns:
        Pieces that tile the local parameter from row 0 on. Rows of vocabulary padding are not
        covered.
    """
    routed = spec.experts is not None and layer in spec.experts.moe_layers
    names = [name.format(layer=layer, expert=expert) for name in source_names(row, routed)]
    match row.sharding:
        case Sharding.WHOLE:
            return [Piece(names[0], None, None, slice(None))]
        case Sharding.VOCABULARY:
            return _vocabulary(names[0], part, spec.vocab_size)
        case Sharding.QKV:
            return _stack(list(_qkv(names, part, spec)))
        case Sharding.GATED:
            neurons = select(neurons_M, part, _neurons(row, spec))
            return _stack([(name, neurons, length(neurons)) for name in names])
        case Sharding.COLUMNS:
            columns = select(neurons_M, part, _width(row, spec))
            return [Piece(names[0], None, columns, slice(None))]
        case Sharding.QK_NORM if spec.qk_norm_spans_heads:
            rows = part.slice_of(shapes_of(row, spec)[0][0])
            return [Piece(names[0], rows, None, slice(None))]
        case Sharding.QK_NORM:
            return [Piece(names[0], None, None, slice(None))]


def select(indices: Selection, part: ShardIndex, total: int) -> slice | NDArray[np.int64]:
    """Return one shard of ``indices`` (None: all ``total``), as a slice if they are consecutive.

    >>> first, second = ShardIndex(0, 2), ShardIndex(1, 2)
    >>> select(np.array([4, 5, 6, 7]), second, 8), select(np.array([7, 5]), first, 8)
    (slice(6, 8, None), slice(7, 8, None))
    """
    if indices is None or isinstance(indices, slice):
        start = indices.start if isinstance(indices, slice) else 0
        stop = indices.stop if isinstance(indices, slice) else total
        local = part.slice_of(stop - start)
        return slice(start + local.start, start + local.stop)
    local_M = indices[part.slice_of(len(indices))]
    first = int(local_M[0])
    if np.array_equal(local_M, np.arange(first, first + len(local_M))):
        return slice(first, first + len(local_M))
    return local_M


def length(selection: slice | NDArray[np.int64]) -> int:
    """Return the number of indices of a selection."""
    if isinstance(selection, slice):
        return selection.stop - selection.start
    return len(selection)


def padded_vocabulary(vocab_size: int, tp: int) -> int:
    """Return the rows of the embedding, padded so that all tp ranks hold the same number.

    >>> padded_vocabulary(49152, 4), padded_vocabulary(128257, 4)
    (49152, 128260)
    """
    return -(-vocab_size // tp) * tp


def _vocabulary(name: str, part: ShardIndex, vocab_size: int) -> list[Piece]:
    padded = part.slice_of(padded_vocabulary(vocab_size, part.size))
    stop = min(padded.stop, vocab_size)
    rows = slice(padded.start, stop)
    return [Piece(name, rows, None, slice(0, stop - padded.start))] if stop > padded.start else []


def _qkv(names: list[str], part: ShardIndex, spec: ModelSpec) -> Iterator[tuple[str, slice, int]]:
    """Yield query heads, key and value of each query group, as in Megatron-Core's fused QKV.

    With more ranks than groups, Megatron-Core cuts the fused rows into equal parts, wherever that
    is, and gathers the output of the projection over tp.
    """
    head = spec.kv_channels
    queries = spec.num_attention_heads // spec.num_query_groups * head
    window = part.slice_of(spec.num_query_groups * (queries + 2 * head))
    start = 0
    for group in range(spec.num_query_groups):
        for name, size in zip(names, (queries, head, head), strict=True):
            first, stop = max(start, window.start), min(start + size, window.stop)
            if first < stop:
                offset = group * size - start
                yield name, slice(first + offset, stop + offset), stop - first
            start += size


def _stack(runs: list[tuple[str, slice | NDArray[np.int64], int]]) -> list[Piece]:
    stacked, start = [], 0
    for name, rows, count in runs:
        stacked.append(Piece(name, rows, None, slice(start, start + count)))
        start += count
    return stacked


def _neurons(row: Row, spec: ModelSpec) -> int:
    """Return the neurons of the source tensor; an expert takes its own from all of them."""
    sizes = source_sizes(spec)
    letter = {Scope.EXPERT: "M", Scope.SHARED: "S"}.get(row.scope)
    return spec.ffn_hidden_size if letter is None else sizes[letter]


def _width(row: Row, spec: ModelSpec) -> int:
    """Return the columns of the source tensor; an expert takes its neurons from all of them."""
    return shapes_of(row, spec, **source_sizes(spec))[0][1]
