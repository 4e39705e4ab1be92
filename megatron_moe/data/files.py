"""Find the files of a text and tell their formats by name.

=====================================  ====================================================
``.jsonl .jsonlines .ndjson .json``    one document per line
``.parquet .arrow .feather``           one document per row; needs pyarrow
``.txt``, and names of no known format  the whole file is one document
=====================================  ====================================================

Case does not matter, and a number may follow the suffix: ``x.jsonl.00001``,
``x.jsonl-00000-of-00008``.
All but tables may be compressed (``.gz .bz2 .xz``, or ``.zst`` with the package zstandard).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from megatron_moe.errors import DataError

Format = Literal["lines", "table", "text"]

_FORMAT_OF_SUFFIX: dict[str, Format] = {
    "jsonl": "lines", "jsonlines": "lines", "ndjson": "lines", "json": "lines",
    "parquet": "table", "arrow": "table", "feather": "table", "txt": "text",
}  # fmt: skip
# A README or a dataset_info.json next to the data is not a document.
_IN_FOLDERS = ("jsonl", "jsonlines", "ndjson", "parquet", "arrow", "feather", "txt")
_NO_TEXT = frozenset(
    {
        "csv", "tsv", "xls", "xlsx", "html", "htm", "xml", "pdf", "doc", "docx", "zip", "tar",
        "tgz", "7z", "rar", "lz4", "npy", "npz", "pkl", "pt", "safetensors", "h5", "tfrecord",
        "mds", "orc", "avro", "db", "sqlite",
    }
)  # fmt: skip
READ_NAMES = ".jsonl, .jsonlines, .ndjson, .json, .parquet, .arrow, .feather, .txt"
_COMPRESSIONS = ("gz", "bz2", "xz", "zst")
_NUMBER = re.compile(r"[.-](\d+(-of-\d+)?|part-?\d+)$")


def text_exists(path: Path) -> bool:
    """Return whether ``path`` is a file or folder of text, or the prefix of token files."""
    return path.exists() or path.with_name(path.name + ".bin").exists()


def compression_of(path: Path) -> str | None:
    """Return ``gz``, ``bz2``, ``xz``, ``zst``, or None if the file is not compressed."""
    suffix = path.suffix[1:].lower()
    return suffix if suffix in _COMPRESSIONS else None


def suffix_of(path: Path) -> str:
    """Return the suffix that names the format, in lower case and without the dot.

    >>> [suffix_of(Path(n)) for n in ("a.JSONL", "a.jsonl.00001", "a.jsonl-00000-of-00008.gz")]
    ['jsonl', 'jsonl', 'jsonl']
    """
    name = path.name.lower()
    if compression_of(path):
        name = name.rpartition(".")[0]
    return Path(_NUMBER.sub("", name)).suffix[1:]


def format_of(path: Path) -> Format:
    """Return how documents are laid out in the file.

    Raises:
        DataError: The name is that of a format that is not read.
    """
    suffix = suffix_of(path)
    if suffix in _NO_TEXT:
        raise DataError(
            f"{path}: .{suffix} files are not read, because their text would include markup or "
            f"binary data.\n  convert it to one of {READ_NAMES}"
        )
    return _FORMAT_OF_SUFFIX.get(suffix, "text")


def find_files(inputs: Sequence[Path]) -> list[Path]:
    """Return the files among ``inputs``, and those in its folders sorted by name.

    Links to folders are followed, hidden files and folders are skipped, and a file that a folder
    holds under several names is read once.

    Raises:
        DataError: An input does not exist, or there is no file to read.
    """
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            files += [file for file in _files_in(path) if suffix_of(file) in _IN_FOLDERS]
        elif path.exists():
            files.append(path)
        else:
            raise DataError(f"{path} does not exist")
    if not files:
        folders = ", ".join(map(str, inputs))
        raise DataError(f"no {READ_NAMES} file (also .gz, .bz2, .xz, .zst) in {folders}")
    return files


def left_out(inputs: Sequence[Path]) -> list[Path]:
    """Return the files in the folders among ``inputs`` that `find_files` leaves out."""
    return [
        file
        for path in inputs
        if path.is_dir()
        for file in _files_in(path)
        if suffix_of(file) not in _IN_FOLDERS
    ]


def _files_in(folder: Path) -> list[Path]:
    """Return all visible files below ``folder``, each once, sorted by name."""
    result: dict[str, Path] = {}
    for file in sorted(_walk(folder, set())):
        result.setdefault(os.path.realpath(file), file)
    return list(result.values())


def _walk(folder: Path, seen: set[str]) -> Iterator[Path]:
    if (real := os.path.realpath(folder)) in seen:  # a link to a folder above it, or a second one
        return
    seen.add(real)
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(entry, seen)
        elif entry.is_file():
            yield entry
