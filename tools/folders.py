"""Output folders that are complete or absent, and that know what they were made from.

A tool fills a sibling folder and renames it at the end, so whoever finds OUT may use it. A small
JSON file in OUT (``source.json``, ``manifest.json``) holds the request it answers: the same request
again returns at once, another one is refused instead of mixed in. Imports stay light, because the
second run of a tool should cost no more than starting Python.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_moe.errors import UserError

Request = Mapping[str, Any]


def is_complete(out: Path, *, record: str, request: Request) -> bool:
    """Whether ``out`` already answers ``request``.

    Raises:
        UserError: ``out`` holds something else. It is never deleted or written over.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / record).read_text(encoding="utf-8"))["request"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{out} exists and was not made by this tool (no readable {record} in it).\n"
            "  Name another folder, or remove this one."
        ) from error
    if found != request:
        raise UserError(
            f"{out} was made for another request: {_words(found)}, now {_words(request)}.\n"
            "  Name another folder, or remove this one."
        )
    return True


@contextmanager
def complete_or_absent(out: Path) -> Iterator[Path]:
    """A folder to fill; it becomes ``out`` when the block ends, and is removed when it raises."""
    staging = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)  # left by a run that was killed
    staging.mkdir(parents=True)
    try:
        yield staging
        staging.rename(out)  # an empty folder at out is replaced, a filled one is an error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_json(path: Path, value: object) -> None:
    """Write ``value`` the way a person reads it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _words(request: Request) -> str:
    return ", ".join(f"{key} = {value}" for key, value in request.items())
