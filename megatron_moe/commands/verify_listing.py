"""List the files of a folder to verify, before any is read, and name those without a checksum."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, field
from pathlib import Path

from megatron_moe.errors import CheckpointError
from megatron_moe.hf.checksums import FILE
from megatron_moe.regular_file import regular

_MOST_NAMED = 20


@dataclass(slots=True)
class Listing:
    """Contents of a folder and its sub-folders; links to folders are not followed."""

    folder: Path
    names: list[str] = field(default_factory=list)
    """Paths of files, and of links to folders, in the folder; ``CHECKSUMS`` is left out."""
    problems: list[str] = field(default_factory=list)
    """Links to nothing, and folders that cannot be read."""
    irregular: list[str] = field(default_factory=list)
    """Pipes, sockets and devices, which are not to be opened."""


def list_folder(folder: Path) -> Listing:
    """Return the contents of a folder; nothing is opened."""
    listing = Listing(folder)
    for path in _walk(folder, listing.problems):
        try:
            regular(path)
        except FileNotFoundError:
            if path.is_symlink():
                problem = f"{path} is a link to {os.readlink(path)}, which does not exist"
                listing.problems.append(problem)
        except OSError as error:
            kind = listing.irregular if error.errno == errno.EINVAL else listing.problems
            kind.append(f"cannot read {path}: {error.strerror or error}")
        else:
            listing.names.append(path.relative_to(folder).as_posix())
    listing.names = sorted(set(listing.names) - {FILE})
    return listing


def _walk(folder: Path, problems: list[str]) -> Iterator[Path]:
    def failed(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            problems.append(f"cannot read the folder {error.filename}: {error.strerror}")

    for parent, folders, files in os.walk(folder, onerror=failed):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        yield from (Path(parent, name) for name in [*files, *links])


def refuse_irregular(listings: Iterable[Listing]) -> None:
    """Refuse folders with pipes, sockets or devices.

    Raises:
        CheckpointError: There are some; the message names each.
    """
    if irregular := [line for listing in listings for line in listing.irregular]:
        raise CheckpointError(
            "\n".join(irregular) + "\n  nothing was read; remove it, or put the file in its place"
        )


def without_checksum(listing: Listing, covered: Set[str]) -> tuple[list[str], list[str]]:
    """Return the names of files that no checksum covers: visible ones, and hidden ones.

    No program loads a hidden file with a model. Downloads, Git and network file systems leave
    some, such as ``.gitattributes``.
    """
    parents = {parent for name in covered for parent in _parents(name)}
    names = [name for name in listing.names if name not in covered and name not in parents]
    hidden = [name for name in names if any(part.startswith(".") for part in name.split("/"))]
    return [name for name in names if name not in hidden], hidden


def _parents(name: str) -> Iterator[str]:
    while "/" in name:
        name = name.rpartition("/")[0]
        yield name


def in_words(names: list[str]) -> str:
    """Return a list of names for a message, at most twenty of them.

    >>> in_words(["a", "b"])
    'a, b'
    """
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(n if n.isprintable() else ascii(n) for n in names[:_MOST_NAMED]) + more
