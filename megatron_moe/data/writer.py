"""Write a token file that can be resumed after a kill: append sequences, then commit.

The folder ``prefix.partial`` holds the tokens so far, the length of each sequence, the last
sequence of each document, and a journal with the committed sizes of these files and the reader's
position. On resume, everything written after the last commit is truncated.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from megatron.core.datasets.indexed_dataset import _IndexWriter
from numpy.typing import NDArray

from megatron_moe.hf.disk import fsync, make_folder, naming, write_text

_JOURNAL = "journal.json"
_PARTS = ("tokens.bin", "lengths", "document_ends", "digests")


class TokenWriter:
    """Append sequences to the token file ``prefix``, resuming from the last commit."""

    def __init__(self, prefix: Path, *, dtype: type[np.number], identity: dict[str, Any]) -> None:
        """Open or create ``prefix.partial``.

        Args:
            prefix: Token file to write.
            dtype: dtype of a token on disk.
            identity: Everything the tokens depend on. A partial file with another identity is
                discarded.
        """
        self.prefix = prefix
        self.folder = Path(f"{prefix}.partial")
        self._dtype = dtype
        self._identity = identity
        self.journal: dict[str, Any] | None = self._read_journal()
        """Argument of the last `commit`, or None if there was none."""
        if self.journal is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            make_folder(self.folder, "the folder for tokens")
        sizes = {} if self.journal is None else self.journal["sizes"]
        self._files = {name: self._open(name, sizes.get(name, 0)) for name in _PARTS}
        self._num_sequences = sizes.get("lengths", 0) // 4

    def append(self, ids_T: NDArray[np.number], lengths_Q: list[int]) -> None:
        """Append sequences, given as their concatenated ids and their lengths."""
        self._files["tokens.bin"].write(ids_T.astype(self._dtype, copy=False).tobytes())
        self._files["lengths"].write(np.asarray(lengths_Q, dtype=np.int32).tobytes())
        self._num_sequences += len(lengths_Q)

    def end_documents(self, num_sequences: int) -> None:
        """Mark each of the last ``num_sequences`` sequences as the last one of a document."""
        ends = np.arange(num_sequences) + self._num_sequences - num_sequences + 1
        self._files["document_ends"].write(ends.astype(np.int64).tobytes())

    def add_digest(self, digest: bytes) -> None:
        """Store a document's hash for a resumed run."""
        self._files["digests"].write(digest)

    def digests(self, size: int) -> set[bytes]:
        """Return all hashes stored so far, of ``size`` bytes each."""
        self._files["digests"].flush()
        raw = (self.folder / "digests").read_bytes()
        return {raw[i : i + size] for i in range(0, len(raw), size)}

    def commit(self, journal: dict[str, Any]) -> None:
        """Sync everything written so far to disk, with ``journal`` to resume from."""
        with naming(self.folder):
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
        sizes = {name: file.tell() for name, file in self._files.items()}
        whole = {**journal, "identity": self._identity, "sizes": sizes}
        write_text(self.folder / _JOURNAL, json.dumps(whole))

    def finish(self) -> None:
        """Write the index with Megatron-Core's writer and move the pair to ``prefix``."""
        self.close()
        lengths_Q = np.fromfile(self.folder / "lengths", dtype=np.int32)
        ends = np.fromfile(self.folder / "document_ends", dtype=np.int64)
        with _IndexWriter(str(self.folder / "tokens.idx"), self._dtype) as index:
            index.write(lengths_Q, None, [0, *ends])
        for name in ("tokens.bin", "tokens.idx"):
            fsync(self.folder / name)
        # The index is moved last: if it exists, the pair is complete.
        os.replace(self.folder / "tokens.bin", f"{self.prefix}.bin")
        os.replace(self.folder / "tokens.idx", f"{self.prefix}.idx")
        shutil.rmtree(self.folder)

    def close(self) -> None:
        """Close the files; data that was not committed is lost."""
        for file in self._files.values():
            file.close()

    def _read_journal(self) -> dict[str, Any] | None:
        try:
            journal = json.loads((self.folder / _JOURNAL).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        # A process that died in `finish` has already moved the tokens away.
        whole = all(
            (part := self.folder / name).exists() and part.stat().st_size >= size
            for name, size in journal["sizes"].items()
        )
        return journal if whole and journal["identity"] == self._identity else None

    def _open(self, name: str, size: int) -> BinaryIO:
        file = (self.folder / name).open("ab")
        file.truncate(size)
        file.seek(size)
        return file
