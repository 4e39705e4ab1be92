"""Which slice of which dense tensor a rank holds. Pure arithmetic, and the only code that knows.

A local parameter is a stack of pieces, each a rectangle of one source tensor: rows and columns to
take, and the rows of the local parameter it goes to. Upcycling reads them, nothing else does it.

Shape letters of this module:

    D  hidden_size   F  ffn_hidden_size (dense)   M  neurons of one expert   V  vocab_size
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_moe.hf.names import Row, Sharding
from megatron_moe.hf.spec import DenseSpec

Selection = slice | NDArray[np.int64] | None
"""Consecutive indices, a list of indices, or all of them."""


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A rectangle of one source tensor and the rows of the local parameter it fills."""

    source: str
    rows: Selection
    columns: Selection
    into: slice

    @property
    def key(self) -> tuple:
        """Equal for pieces that take the same numbers from the same tensor."""
        return (self.source, *(_hashable(s) for s in (self.rows, self.columns)))


def _hashable(selection: Selection) -> object:
    return selection.tobytes() if isinstance(selection, np.ndarray) else str(selection)


@dataclass(frozen=True, slots=True)
class Part:
    """Which of how many equal parts: a rank's place in its tensor-parallel group."""

    rank: int
    size: int

    def of(self, length: int) -> slice:
        """This part of ``length`` consecutive things.

        >>> Part(1, 4).of(8)
        slice(2, 4, None)
        """
        share = length // self.size
        return slice(self.rank * share, (self.rank + 1) * share)


def pieces(
    row: Row, *, layer: int | None, part: Part, spec: DenseSpec, neurons_M: Selection = None
) -> list[Piece]:
    """What one local parameter is made of.

    Args:
        row: The parameter's row of the name table.
        layer: Global layer id, for the source's name.
        part: Place in the group that shares the parameter: tp, or etp for an expert.
        spec: The dense model.
        neurons_M: For an expert, the dense neurons it is made of; None takes all of them.

    Returns:
        Pieces that tile the local parameter from row 0 on; of a padded vocabulary, only the rows
        that exist.
    """
    names = [template.format(layer=layer) for template in row.hf]
    match row.sharding:
        case Sharding.WHOLE:
            return [Piece(names[0], None, None, slice(None))]
        case Sharding.VOCABULARY:
            return _vocabulary(names[0], part, spec.vocab_size)
        case Sharding.QKV:
            return _stack(list(_qkv(names, part, spec)))
        case Sharding.GATED:
            mine = select(neurons_M, part, spec.ffn_hidden_size)
            return _stack([(name, mine, length(mine)) for name in names])
        case Sharding.COLUMNS:
            width = _input_width(row, spec)
            return [Piece(names[0], None, select(neurons_M, part, width), slice(None))]


def select(indices: Selection, part: Part, total: int) -> slice | NDArray[np.int64]:
    """This part of a list of indices (None: all ``total``), as a slice where they run on.

    >>> select(np.array([4, 5, 6, 7]), Part(1, 2), 8), select(np.array([7, 5]), Part(0, 2), 8)
    (slice(6, 8, None), slice(7, 8, None))
    """
    if indices is None or isinstance(indices, slice):
        start = indices.start if isinstance(indices, slice) else 0
        stop = indices.stop if isinstance(indices, slice) else total
        mine = part.of(stop - start)
        return slice(start + mine.start, start + mine.stop)
    mine_M = indices[part.of(len(indices))]
    first = int(mine_M[0])
    if np.array_equal(mine_M, np.arange(first, first + len(mine_M))):
        return slice(first, first + len(mine_M))
    return mine_M


def length(selection: slice | NDArray[np.int64]) -> int:
    """How many indices a selection takes."""
    if isinstance(selection, slice):
        return selection.stop - selection.start
    return len(selection)


def padded_vocabulary(vocab_size: int, tp: int) -> int:
    """Rows of the embedding so that every tp rank holds as many.

    >>> padded_vocabulary(49152, 4), padded_vocabulary(128257, 4)
    (49152, 128260)
    """
    return -(-vocab_size // tp) * tp


def _vocabulary(name: str, part: Part, vocab_size: int) -> list[Piece]:
    mine = part.of(padded_vocabulary(vocab_size, part.size))
    stop = min(mine.stop, vocab_size)
    rows = slice(mine.start, stop)
    return [Piece(name, rows, None, slice(0, stop - mine.start))] if stop > mine.start else []


def _qkv(names: list[str], part: Part, spec: DenseSpec) -> Iterator[tuple[str, slice, int]]:
    """Query heads, key and value of each query group in turn, as Megatron-Core's fused QKV."""
    head = spec.kv_channels
    queries = spec.num_attention_heads // spec.num_query_groups * head
    groups = part.of(spec.num_query_groups)
    for group in range(groups.start, groups.stop):
        for name, size in zip(names, (queries, head, head), strict=True):
            yield name, slice(group * size, (group + 1) * size), size


def _stack(runs: list[tuple[str, slice | NDArray[np.int64], int]]) -> list[Piece]:
    found, at = [], 0
    for name, rows, count in runs:
        found.append(Piece(name, rows, None, slice(at, at + count)))
        at += count
    return found


def _input_width(row: Row, spec: DenseSpec) -> int:
    if row.role == "proj":
        return spec.num_attention_heads * spec.kv_channels
    return spec.ffn_hidden_size
