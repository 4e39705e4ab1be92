"""Read and check the headers of a safetensors folder, before any tensor is read.

Nothing in a folder is executed or unpickled; ``pytorch_model.bin`` is rejected.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from megatron_moe.errors import CheckpointError
from megatron_moe.hf.dtypes import OF_SAFETENSORS
from megatron_moe.json_text import parse_json
from megatron_moe.regular_file import regular

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")

_MOST_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_MOST_LISTED = 20
_LONGEST_NAME = 255  # bytes, of the usual file systems


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape, dtype and location of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    offset: int
    """Bytes from the start of the file."""

    @property
    def num_bytes(self) -> int:
        """Size of the tensor in the file, in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, first: int, count: int) -> TensorInfo:
        """Return the location of ``count`` rows from row ``first`` on."""
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        return replace(self, shape=(count, *self.shape[1:]), offset=self.offset + first * row)

    def at(self, index: int) -> TensorInfo:
        """Return the location of one tensor of a stack of them."""
        return replace(self.rows(index, 1), shape=self.shape[1:])


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """Return every tensor of the folder, by name.

    Raises:
        CheckpointError: A file is missing, truncated, outside the folder, or not safetensors.
    """
    if (folder / SINGLE_FILE).exists():
        return _read_header(_weights_file(folder))
    if (folder / INDEX_FILE).exists():
        return _read_shards(folder, _read_index(folder / INDEX_FILE))
    if (file_of := index_of_shards(folder)) is not None:
        return _read_shards(folder, file_of)
    return _read_header(_weights_file(folder))


def index_of_shards(folder: Path) -> dict[str, str] | None:
    """Return the file of each tensor in a folder of numbered shards without an index.

    Return None if the folder has no such files.

    Raises:
        CheckpointError: Not all shards are there, or two hold a tensor of the same name.
    """
    numbered = [(path, match) for path in sorted(folder.glob("model-*.safetensors"))
                if (match := _SHARD.fullmatch(path.name))]  # fmt: skip
    if not numbered:
        return None
    count = int(numbered[0][1][2])
    if sorted(int(match[1]) for _, match in numbered) != list(range(1, count + 1)):
        raise CheckpointError(
            f"{folder} has {len(numbered)} of {count} shards, and no {INDEX_FILE} that lists them."
            "\n  finish the download or copy of the folder"
        )
    file_of: dict[str, str] = {}
    for path, _ in numbered:
        for name in _read_header(path):
            if name in file_of:
                raise CheckpointError(f"{name} is in {file_of[name]} and in {path.name}")
            file_of[name] = path.name
    return file_of


def _weights_file(folder: Path) -> Path:
    path = folder / SINGLE_FILE
    if path.exists():
        return path
    if any(folder.glob("pytorch_model*.bin*")):
        raise CheckpointError(
            f"{folder} stores its weights as pickles (pytorch_model*.bin), which can run code when "
            "they are opened: only safetensors are supported.\n"
            "  if you trust their source, convert them:\n"
            "    from transformers import AutoModelForCausalLM, AutoTokenizer\n"
            f"    folder, out = {str(folder)!r}, {str(folder) + '-safetensors'!r}\n"
            '    AutoModelForCausalLM.from_pretrained(folder, dtype="auto").save_pretrained(out)\n'
            "    AutoTokenizer.from_pretrained(folder).save_pretrained(out)"
        )
    raise CheckpointError(
        f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}: it contains "
        f"{', '.join(sorted(path.name for path in folder.iterdir()))}"
    )


def _read_shards(folder: Path, file_of: Mapping[str, str]) -> dict[str, TensorInfo]:
    files = sorted(set(file_of.values()))
    if absent := [file for file in files if not (folder / file).exists()]:
        raise CheckpointError(
            f"{folder} lacks files that its {INDEX_FILE} lists.\n"
            + "\n".join(listing(f"of {len(files)} missing", absent))
            + "\n  finish the download or copy of the folder"
        )
    headers = {file: _read_header(folder / file) for file in files}
    # Keep tensors that are in a shard but not in the index: check_tensors reports them.
    tensors = {name: info for header in headers.values() for name, info in header.items()}
    for name, file in file_of.items():
        if name not in headers[file]:
            raise CheckpointError(
                f"{name} must be in {file} according to {INDEX_FILE}, but it is missing there.\n"
                f"  file: {folder / file}"
            )
        tensors[name] = headers[file][name]
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    try:
        file_of = parse_json(regular(path).read_text(encoding="utf-8"))["weight_map"]
        entries = [(str(name), str(file)) for name, file in file_of.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f'{path} is not an index of tensors: expected {{"weight_map": {{NAME: FILE}}}}, '
            f"found {type(error).__name__}: {error}"
        ) from error
    for name, file in entries:
        # Check the name, not the link target: the Hub's cache has links to ../../blobs.
        if not _is_below_the_folder(file):
            raise CheckpointError(
                f"{path} lists the file {file[:99]!r} for {name}: it must be in the index's folder"
            )
    return dict(entries)


def _is_below_the_folder(file: str) -> bool:
    """Return whether a name from an index can be one of a file below its folder."""
    parts = PurePosixPath(file).parts
    try:
        lengths = [len(os.fsencode(part)) for part in parts]
    except UnicodeEncodeError:
        return False
    legal = "\0" not in file and 0 < max(lengths, default=0) <= _LONGEST_NAME
    return legal and not PurePosixPath(file).is_absolute() and ".." not in parts


def _read_header(path: Path) -> dict[str, TensorInfo]:
    """Return every tensor of one safetensors file, after checking that each can be read.

    The format is https://github.com/huggingface/safetensors#format: eight bytes of header length,
    the header as JSON, then the tensors without gaps.
    """
    entries, start, file_bytes = _parse_header(path)
    _check_dtypes(path, entries)
    tensors = {name: _tensor_info(path, name, entry, start) for name, entry in entries.items()}
    end = start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if info.offset != end:
            raise _bad_header(path, f"{name} begins at byte {info.offset}, expected {end}")
        end += info.num_bytes
    if end != file_bytes:
        raise CheckpointError(
            f"{path} is {'truncated' if end > file_bytes else 'too long'}: its header requires "
            f"{end} bytes, but it has {file_bytes}.\n  download or copy the file again"
        )
    return tensors


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata in the header of a safetensors file, empty if it has none.

    Raises:
        CheckpointError: It is not a safetensors file.
    """
    metadata = _read_entries(path)[0].get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def _parse_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """Return the header's tensors, the byte where they begin, and the size of the file."""
    entries, start, file_bytes = _read_entries(path)
    entries.pop("__metadata__", None)
    return entries, start, file_bytes


def _read_entries(path: Path) -> tuple[dict[str, Any], int, int]:
    """Return the header's entries, the byte where tensors begin, and the size of the file."""
    try:
        file_bytes = path.stat().st_size
        with regular(path).open("rb") as file:
            prefix = file.read(8)
            header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= header_bytes <= min(_MOST_HEADER_BYTES, file_bytes - 8):
                raise _bad_header(path, f"a header of {header_bytes} bytes in {file_bytes} bytes")
            entries = parse_json(file.read(header_bytes))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise _bad_header(path, f"a header that is not JSON ({error})") from error
    if not isinstance(entries, dict):
        raise _bad_header(path, "a header that is not a JSON object")
    return entries, 8 + header_bytes, file_bytes


def _tensor_info(path: Path, name: str, entry: dict[str, Any], start: int) -> TensorInfo:
    try:
        shape = tuple(int(size) for size in entry["shape"])
        begin, end = (int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _bad_header(path, f"{name}: {entry}") from error
    info = TensorInfo(shape, OF_SAFETENSORS[entry["dtype"]], path, start + begin)
    if min(shape, default=0) < 0 or begin < 0 or end - begin != info.num_bytes:
        raise _bad_header(
            path, f"{name} of {shape} {entry['dtype']} in bytes {begin} to {end} of its tensors"
        )
    return info


def _check_dtypes(path: Path, entries: Mapping[str, Any]) -> None:
    dtypes = {n: e.get("dtype") if isinstance(e, dict) else e for n, e in entries.items()}
    known = OF_SAFETENSORS
    unsupported = [f"{name} is {dt}" for name, dt in dtypes.items() if str(dt) not in known]
    if unsupported:
        raise CheckpointError(
            f"{path} contains tensors of unsupported dtypes: expected {', '.join(known)}.\n"
            + "\n".join(listing("found", unsupported))
            + "\n  a quantized checkpoint must be dequantized to bf16 first"
        )


def _bad_header(path: Path, found: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a safetensors file: found {found}")


def listing(title: str, lines: Iterable[str]) -> list[str]:
    """Format a list for an error message: a count, then the first lines, indented.

    Return no lines if ``lines`` is empty.
    """
    lines = list(lines)
    if not lines:
        return []
    listed = [f"    {line}" for line in lines[:_MOST_LISTED]]
    more = [f"    and {len(lines) - _MOST_LISTED} more"] if len(lines) > _MOST_LISTED else []
    return [f"  {len(lines)} {title}:", *listed, *more]
