"""Verify tensors without checksums: headers fit their files, and all values are finite."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_moe.checkpoint.global_tensors import GlobalTensors
from megatron_moe.commands.verify_listing import Listing
from megatron_moe.errors import CheckpointError
from megatron_moe.hf.checksums import FILE, MARK
from megatron_moe.hf.header import TensorInfo, read_headers, read_metadata
from megatron_moe.hf.values import check_finite, mapped_rows
from megatron_moe.hf.windows import windows

_SHA256 = re.compile(r"[0-9a-f]{64}")
_CARD = "model, built from the source model and trained further by megatron_moe "
"""Words of the model card of each export; users may change the card."""


@dataclass(slots=True)
class WithoutChecksums:
    """Files of a folder without checksums that were checked, and their problems."""

    names: set[str] = field(default_factory=set)
    """Files that were checked, by their path in the folder."""
    problems: list[str] = field(default_factory=list)


def check_values(
    listing: Listing, *, is_checkpoint: bool, seen: Callable[[int], None]
) -> WithoutChecksums:
    """Check what can be checked without checksums.

    Files in the Hub's cache carry their SHA-256 in the name of what they link to, and are compared
    with it.

    Args:
        listing: Contents of the folder.
        is_checkpoint: Whether it is a checkpoint of a run; otherwise it is a Hugging Face folder.
        seen: Called with the bytes of each tensor that was read.
    """
    result = WithoutChecksums()
    _check_sha256(listing, result)
    checks = _tensors_of_checkpoint if is_checkpoint else _tensors_of_model
    try:
        for path, num_bytes, problem in checks(listing.folder):
            result.names.add(path.relative_to(listing.folder).as_posix())
            seen(num_bytes)
            if problem is not None:
                result.problems.append(problem)
    except CheckpointError as error:
        result.problems.append(str(error))
    return result


def lost_checksums(listing: Listing) -> str | None:
    """Return the problem if this package wrote a folder with ``CHECKSUMS``, which is missing."""
    for name in (name for name in listing.names if name.endswith(".safetensors")):
        try:
            marked = MARK.items() <= read_metadata(listing.folder / name).items()
        except CheckpointError:
            continue
        if marked:
            return (
                f"{listing.folder / FILE} is missing: {name} says that it was written with this "
                "file, so nothing tells whether other files have changed since then.\n"
                f"  copy {FILE} from where this folder was copied from, or export the run again"
            )
    return None


def is_older_export(folder: Path) -> bool:
    """Return whether the model card is that of an export, whose weights do not state checksums."""
    card = folder / "README.md"
    return card.is_file() and _CARD in card.read_text(encoding="utf-8", errors="replace")


def _check_sha256(listing: Listing, result: WithoutChecksums) -> None:
    for name in listing.names:
        path = listing.folder / name
        if not (path.is_symlink() and _SHA256.fullmatch(expected := path.readlink().name)):
            continue
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        result.names.add(name)
        if digest != expected:
            result.problems.append(
                f"{path} is damaged: its SHA-256 is {digest}, but its cache names {expected}"
            )


def _tensors_of_checkpoint(folder: Path) -> Iterator[tuple[Path, int, str | None]]:
    """Yield the file and bytes of each stored chunk, and its problem if it has one."""
    with GlobalTensors(folder) as tensors:
        yield folder / ".metadata", 0, None
        for key in tensors.names:
            for chunk in tensors.chunks(key, index=None):
                path = tensors.file_of(key, chunk)
                try:
                    values = tensors.load(key, chunk)
                except CheckpointError as error:
                    yield path, 0, str(error).splitlines()[0]
                    continue
                finite = not values.is_floating_point() or bool(values.isfinite().all())
                problem = None if finite else f"{key} in {path} is not finite"
                yield path, values.nbytes, problem


def _tensors_of_model(folder: Path) -> Iterator[tuple[Path, int, str | None]]:
    """Yield the file and bytes of each tensor, and its problem if it cannot be read or used."""
    for name, info in read_headers(folder).items():
        try:
            _check_finite(name, info)
        except CheckpointError as error:
            yield info.file, info.num_bytes, str(error)
        else:
            yield info.file, info.num_bytes, None


def _check_finite(name: str, info: TensorInfo) -> None:
    if not info.shape or not info.num_bytes:
        return
    for window in windows(info, [slice(0, info.shape[0])]):
        where = f"rows {window.start} to {window.stop - 1}"
        check_finite(name, info, mapped_rows(info, window), where)
