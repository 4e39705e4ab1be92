"""Read only the needed rows, columns or indices of the tensors in a Hugging Face folder.

Whole rows are read directly into the destination if it has the file's dtype. In all other cases
the reader maps one window of the file at a time, copies the selected part to its destination, and
unmaps the window. The resident memory is the destinations and one window, for a model of any size::

    file     |header|..tensor..[  window  ]..........|     at most WINDOW_BYTES mapped
                                 |  | |                     selected rows / columns of the window
    destination            [.....**.*........]              a view of a parameter, dtype converted

Several selections of one tensor use the same windows, so that the file is read once.

Nothing in a folder is executed or unpickled; ``pytorch_model.bin`` is rejected.
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
from megatron_moe.hf.names import dense_tensors, llama_tensors
from megatron_moe.hf.selection import Indices, Selected, select
from megatron_moe.hf.spec import ModelSpec, read_spec
from megatron_moe.hf.values import check_finite, mapped_rows, read_rows, take
from megatron_moe.hf.windows import windows

# Buffers saved by older versions of transformers. The model recomputes them from config.json.
_RECOMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_OUTPUT, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True, eq=False)
class ReadRequest:
    """Rows and columns of a tensor to read, and their destination."""

    destination: Tensor
    rows: Indices | None = None
    columns: Indices | None = None


@dataclass(slots=True)
class SourceCheckpoint:
    """A source model on disk: its shape, its tensors, and methods to read slices of them."""

    folder: Path
    spec: ModelSpec
    tensors: Mapping[str, TensorInfo]
    bytes_read: int = field(default=0, init=False)
    """Bytes requested so far; an index that is requested twice counts twice."""

    @property
    def source_bytes(self) -> int:
        """Total size of all tensors, in bytes."""
        return sum(info.num_bytes for info in self.tensors.values())

    def fingerprint(self) -> str:
        """Return a hash that identifies the model: tensor names, shapes and first bytes of each."""
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
        """Return the selected rows and columns of tensor ``name``, in the file's dtype.

        Args:
            name: A key of ``tensors``, 1-D or 2-D.
            rows: Indices of dimension 0; None selects all.
            columns: Indices of dimension 1; None selects all.

        Raises:
            CheckpointError: See ``read_into``.
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

        The selection is copied window by window, in place, and converted to the destination's
        dtype and device. The destination may be any view, also of a parameter. If an error occurs,
        the destination is partially filled, and the caller must stop.

        Args:
            name: A key of ``tensors``, 1-D or 2-D.
            destination: Tensor with the shape of the selection.
            rows: Indices of dimension 0; None selects all.
            columns: Indices of dimension 1; None selects all.

        Raises:
            CheckpointError: The tensor does not exist, an index is out of range, the file became
                unreadable, or values are not finite.
        """
        self.read_all_into(name, [ReadRequest(destination, rows, columns)])

    def read_all_into(self, name: str, requests: Sequence[ReadRequest]) -> None:
        """Fill several destinations in one pass; their selections may overlap.

        Raises:
            CheckpointError: See ``read_into``.
        """
        info = self._find(name)
        pairs = []
        for request in requests:
            selection = select(name, info, request.rows, request.columns)
            shape, expected = tuple(request.destination.shape), selection.shape
            assert shape == expected, f"{name}: destination is {shape}, selection is {expected}"
            pairs.append((selection, request.destination.detach()))
        self._copy(name, info, pairs)

    def check_tensors(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Compare names and shapes with ``expected``, before any weight is read.

        Two kinds of extra tensors are allowed: rotary frequencies saved by old versions of
        transformers, and an ``lm_head.weight`` next to tied embeddings. The latter must equal the
        embedding; both are read for the comparison and counted in ``bytes_read``. If they differ,
        either ``tie_word_embeddings`` or the tensor is wrong, and only the user can know which.

        Raises:
            CheckpointError: Tensors are missing, unexpected or misshapen; the message lists all.
        """
        extra = sorted(self.tensors.keys() - expected.keys())
        extra = [name for name in extra if not _RECOMPUTED.fullmatch(name)]
        if self.spec.tied_embeddings and _OUTPUT in extra and _EMBEDDING in self.tensors:
            extra.remove(_OUTPUT)
            self._check_tied()
        problems = [
            *listing("missing", sorted(expected.keys() - self.tensors.keys())),
            *listing("unexpected", extra),
            *listing("of the wrong shape", self._misshapen(expected)),
        ]
        if problems:
            raise CheckpointError(
                f"{self.folder} does not contain the tensors that its config.json requires.\n"
                + "\n".join(problems)
            )

    def _misshapen(self, expected: Mapping[str, tuple[int, ...]]) -> list[str]:
        return [
            f"{name} is {info.shape}, but config.json requires {tuple(shape)}\n"
            f"      file: {info.file}"
            for name, shape in expected.items()
            if (info := self.tensors.get(name)) and info.shape != tuple(shape)
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
                f"{_OUTPUT} must equal {_EMBEDDING}, because config.json ties them, but their "
                f"values differ.\n  file: {output.file}\n"
                "  set tie_word_embeddings to false in config.json if the model was trained with "
                f"a separate output layer, or remove {_OUTPUT}"
            )

    def _copy(self, name: str, info: TensorInfo, pairs: Sequence[tuple[Selected, Tensor]]) -> None:
        pairs = [(selection, into) for selection, into in pairs if into.numel()]
        self.bytes_read += sum(into.numel() for _, into in pairs) * info.dtype.itemsize
        if len(pairs) == 1 and _is_contiguous_copy(info, *pairs[0]):
            read_rows(name, info, pairs[0][0].rows, pairs[0][1])
            return
        for window in windows(info, [selection.rows for selection, _ in pairs]):
            mapped = mapped_rows(info, window)
            where = f"rows {window.start} to {window.stop - 1}"
            for copy in window.copies:
                selection, into = pairs[copy.selection]
                direct = isinstance(copy.into, slice) and into.is_cpu and into.dtype == info.dtype
                out = into[copy.into] if direct else None
                values = take(mapped, copy.rows, selection.columns, out)
                check_finite(name, info, values, where)
                if out is None:
                    _put(values, into, copy.into)
                del values
            del mapped  # unmapped before the next window is mapped

    def _find(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder} has no tensor {name}")
        return self.tensors[name]


def _put(values: Tensor, into: Tensor, rows: slice | Tensor) -> None:
    if isinstance(rows, slice):
        into[rows].copy_(values)
    else:
        into.index_copy_(0, rows.to(into.device), values.to(into.device, into.dtype))


def _is_contiguous_copy(info: TensorInfo, selection: Selected, into: Tensor) -> bool:
    """Return whether the destination equals consecutive bytes of the file, without conversion."""
    whole_rows = isinstance(selection.rows, slice) and selection.shape[1:] == info.shape[1:]
    whole_rows = whole_rows and not isinstance(selection.columns, Tensor)
    return whole_rows and into.is_contiguous() and into.is_cpu and into.dtype == info.dtype


def open_safetensors(folder: Path) -> SourceCheckpoint:
    """Open the model in ``folder``, reading only config.json and headers.

    Args:
        folder: A Hugging Face folder, or a snapshot in the Hub's cache, whose files are links.

    Raises:
        CheckpointError: The model cannot be reproduced, or a file is missing, truncated, outside
            the folder, or of an unsupported format.
    """
    folder = Path(folder)
    spec = read_spec(folder)
    tensors = llama_tensors(read_headers(folder), spec)
    if spec.tied_embeddings and _EMBEDDING not in tensors and _OUTPUT in tensors:
        tensors[_EMBEDDING] = tensors.pop(_OUTPUT)  # saved under the other name of the two
    return SourceCheckpoint(folder, spec, tensors)


def open_mixed(dense: SourceCheckpoint, folders: Sequence[Path]) -> list[SourceCheckpoint]:
    """Open the other source models of ``upcycle.mix_with``, which must have the shape of ``dense``.

    Their FFNs become experts, and their other weights are averaged with those of ``dense``.

    Raises:
        CheckpointError: A model has another shape; the message lists the differences.
    """
    expected = asdict(dense.spec)
    checkpoints = []
    for folder in folders:
        other = open_safetensors(folder)
        other.check_tensors(dict(dense_tensors(other.spec)))
        if differences := [
            f"    {key}: {value} and {expected[key]}"
            for key, value in asdict(other.spec).items()
            if value != expected[key] and key not in _MAY_DIFFER
        ]:
            raise CheckpointError(
                f"{folder} (upcycle.mix_with) and {dense.folder} (source.path) must have the same "
                "shape, because their weights are averaged, but differ in\n"
                + "\n".join(differences)
            )
        checkpoints.append(other)
    return checkpoints


_MAY_DIFFER = frozenset(
    {"max_position_embeddings", "initializer_range", "eos_token_id", "bos_token_id"}
)
