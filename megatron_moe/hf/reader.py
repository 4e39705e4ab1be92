"""Read rows, columns or index lists of the tensors in a Hugging Face folder, and nothing else.

Whole rows for memory of the file's dtype are read into it. For all else a window of the file is
mapped, the wanted part copied to its destination, and unmapped, one at a time: so a process is
resident with its destinations and one window, whatever the size of the model::

    file     |header|..tensor..[  window  ]..........|     never more than WINDOW_BYTES mapped
                                 |  | |                     wanted rows / columns of the window
    destination            [.....**.*........]              a view of a parameter, dtype converted

What several destinations want of one tensor is taken from the same windows: the file passes once.

Nothing of a folder is executed or unpickled; ``pytorch_model.bin`` is refused.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megatron_moe.errors import CheckpointError
from megatron_moe.hf.header import TensorInfo, listing, read_headers
from megatron_moe.hf.names import dense_tensors
from megatron_moe.hf.selection import Indices, Selected, select
from megatron_moe.hf.spec import DenseSpec, read_spec
from megatron_moe.hf.values import check_finite, mapped_rows, read_rows, taken
from megatron_moe.hf.windows import windows

# Buffers that older versions of transformers saved. The model recomputes them from config.json.
_RECOMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_OUTPUT, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """Rows and columns of a tensor, and where they go."""

    destination: Tensor
    rows: Indices | None = None
    columns: Indices | None = None


@dataclass(slots=True)
class DenseCheckpoint:
    """A dense model on disk: what it is, which tensors it has, and slices of them."""

    folder: Path
    spec: DenseSpec
    tensors: Mapping[str, TensorInfo]
    bytes_read: int = field(default=0, init=False)
    """Bytes asked for so far; an index asked for twice counts twice."""

    @property
    def source_bytes(self) -> int:
        """Size of all tensors together."""
        return sum(info.num_bytes for info in self.tensors.values())

    def fingerprint(self) -> str:
        """A hash that tells dense models apart: their tensors and the first bytes of each."""
        digest = hashlib.sha256()
        for name, info in sorted(self.tensors.items()):
            digest.update(f"{name} {info.dtype} {info.shape}".encode())
            with info.file.open("rb") as file:
                file.seek(info.offset)
                digest.update(file.read(min(info.num_bytes, 4096)))
        return digest.hexdigest()

    def read(
        self, name: str, *, rows: Indices | None = None, columns: Indices | None = None
    ) -> Tensor:
        """A new tensor of the file's dtype: the selected rows and columns of tensor ``name``.

        Args:
            name: A key of ``tensors``, 1-D or 2-D.
            rows: Which indices of dimension 0; None takes all.
            columns: Which indices of dimension 1; None takes all.

        Raises:
            CheckpointError: As ``read_into``.
        """
        info = self._find(name)
        selection = select(name, info, rows, columns)
        destination = torch.empty(selection.shape, dtype=info.dtype)
        self._copy(name, info, [(selection, destination)])
        return destination

    def read_into(
        self,
        name: str,
        destination: Tensor,
        *,
        rows: Indices | None = None,
        columns: Indices | None = None,
    ) -> None:
        """Fill ``destination`` with the selected rows and columns of tensor ``name``.

        The copy is made window by window into the destination's memory and dtype, on its device;
        the destination may be any view, of a parameter too. Of a file that is refused half-way,
        the destination holds a part: the caller must stop.

        Args:
            name: A key of ``tensors``, 1-D or 2-D.
            destination: Has the shape of the selection.
            rows: Which indices of dimension 0; None takes all.
            columns: Which indices of dimension 1; None takes all.

        Raises:
            CheckpointError: No such tensor, indices that it does not have, a file that became
                unreadable, or values that are not finite.
        """
        self.read_all_into(name, [Wanted(destination, rows, columns)])

    def read_all_into(self, name: str, wanted: Sequence[Wanted]) -> None:
        """`read_into` for several destinations, which may want the same numbers, in one pass.

        Raises:
            CheckpointError: As ``read_into``.
        """
        info = self._find(name)
        pairs = []
        for one in wanted:
            selection = select(name, info, one.rows, one.columns)
            found, expected = tuple(one.destination.shape), selection.shape
            assert found == expected, f"{name}: {found} is to hold a selection of {expected}"
            pairs.append((selection, one.destination.detach()))
        self._copy(name, info, pairs)

    def check_tensors(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Compare names and shapes with ``expected``, before anything is read.

        Two kinds of extra tensors are harmless: rotary frequencies saved by old versions of
        transformers, and an ``lm_head.weight`` next to tied embeddings. The latter must equal the
        embedding, which is read for it and counted: where it differs, ``tie_word_embeddings`` is
        wrong for one of the two, and only the user can know for which.

        Raises:
            CheckpointError: Lists all that is missing, unexpected or of another shape.
        """
        extra = sorted(self.tensors.keys() - expected.keys())
        extra = [name for name in extra if not _RECOMPUTED.fullmatch(name)]
        if self.spec.tied_embeddings and _OUTPUT in extra and _EMBEDDING in self.tensors:
            extra.remove(_OUTPUT)
            self._check_tied()
        problems = [
            *listing("missing", sorted(expected.keys() - self.tensors.keys())),
            *listing("not part of such a model", extra),
            *listing("of another shape", self._misshapen(expected)),
        ]
        if problems:
            raise CheckpointError(
                f"{self.folder} does not hold the tensors that its config.json promises.\n"
                + "\n".join(problems)
            )

    def _misshapen(self, expected: Mapping[str, tuple[int, ...]]) -> list[str]:
        return [
            f"{name} is {found.shape}, but config.json promises {tuple(shape)}\n"
            f"      file: {found.file}"
            for name, shape in expected.items()
            if (found := self.tensors.get(name)) and found.shape != tuple(shape)
        ]

    def _check_tied(self) -> None:
        output, embedding = self.tensors[_OUTPUT], self.tensors[_EMBEDDING]
        same = output.shape == embedding.shape
        for window in windows(output, [slice(0, output.shape[0])]) if same else ():
            rows = slice(window.start, window.stop)
            same = same and torch.equal(
                self.read(_OUTPUT, rows=rows).float(), self.read(_EMBEDDING, rows=rows).float()
            )
        if not same:
            raise CheckpointError(
                f"{_OUTPUT} must equal {_EMBEDDING}, because config.json says that they are tied, "
                f"but it holds other values.\n  file: {output.file}\n"
                "  set tie_word_embeddings to false in config.json if the model was trained with "
                f"an output layer of its own, or remove {_OUTPUT}"
            )

    def _copy(self, name: str, info: TensorInfo, pairs: Sequence[tuple[Selected, Tensor]]) -> None:
        pairs = [(selection, into) for selection, into in pairs if into.numel()]
        self.bytes_read += sum(into.numel() for _, into in pairs) * info.dtype.itemsize
        if len(pairs) == 1 and _bytes_are_the_same(info, *pairs[0]):
            read_rows(name, info, pairs[0][0].rows, pairs[0][1])
            return
        for window in windows(info, [selection.rows for selection, _ in pairs]):
            mapped = mapped_rows(info, window)
            where = f"rows {window.start} to {window.stop - 1}"
            for part in window.parts:
                selection, into = pairs[part.of]
                straight = isinstance(part.into, slice) and into.is_cpu and into.dtype == info.dtype
                out = into[part.into] if straight else None
                values = taken(mapped, part.take, selection.columns, out)
                check_finite(name, info, values, where)
                if out is None:
                    _put(values, into, part.into)
                del values
            del mapped  # unmapped before the next window is mapped

    def _find(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder} holds no tensor {name}")
        return self.tensors[name]


def _put(values: Tensor, into: Tensor, rows: slice | Tensor) -> None:
    if isinstance(rows, slice):
        into[rows].copy_(values)
    else:
        into.index_copy_(0, rows.to(into.device), values.to(into.device, into.dtype))


def _bytes_are_the_same(info: TensorInfo, selection: Selected, into: Tensor) -> bool:
    """Whether the destination is a run of the file, byte for byte: nothing to gather, convert."""
    whole_rows = isinstance(selection.rows, slice) and selection.shape[1:] == info.shape[1:]
    whole_rows = whole_rows and not isinstance(selection.columns, Tensor)
    return whole_rows and into.is_contiguous() and into.is_cpu and into.dtype == info.dtype


def open_dense_checkpoint(folder: Path) -> DenseCheckpoint:
    """The dense model in ``folder``, of which only config.json and headers have been read.

    Args:
        folder: A Hugging Face folder, or a snapshot in the cache of the Hub, whose files are links.

    Raises:
        CheckpointError: A model that cannot be reproduced, or files that are missing, cut off,
            outside the folder, or of a kind that is not read.
    """
    folder = Path(folder)
    spec = read_spec(folder)
    return DenseCheckpoint(folder, spec, read_headers(folder))


def open_mixed(dense: DenseCheckpoint, folders: Sequence[Path]) -> list[DenseCheckpoint]:
    """Checkpoints of the shape of ``dense``, to take experts from and to average with it.

    Raises:
        CheckpointError: One is of another shape; says in what.
    """
    opened = []
    for folder in folders:
        other = open_dense_checkpoint(folder)
        other.check_tensors(dict(dense_tensors(other.spec)))
        if differences := [
            f"    {key}: {value} and {ours[key]}"
            for ours in [asdict(dense.spec)]
            for key, value in asdict(other.spec).items()
            if value != ours[key] and key not in _MAY_DIFFER
        ]:
            raise CheckpointError(
                f"{folder} (upcycle.mix_with) and {dense.folder} (dense.path) must be models of "
                "one shape, because their weights are averaged, but differ in\n"
                + "\n".join(differences)
            )
        opened.append(other)
    return opened


_MAY_DIFFER = frozenset(
    {"max_position_embeddings", "initializer_range", "eos_token_id", "bos_token_id"}
)
