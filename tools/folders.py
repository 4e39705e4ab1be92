"""Create output folders atomically, and record the request that they were created for.

A tool fills a temporary folder next to OUT and renames it at the end, so OUT is complete or absent.
A JSON file in OUT (``source.json``, ``manifest.json``) records the request: the same request
returns at once, and another one is an error. Imports are light, so that running a tool again costs
little more than starting Python.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_moe.errors import UserError
from megatron_moe.hf.disk import disk_errors_in_words, make_folder

Request = Mapping[str, Any]


def is_complete(out: Path, *, record: str, request: Request) -> bool:
    """Return whether ``out`` is complete for ``request``.

    Raises:
        UserError: ``out`` has other contents. It is never deleted or overwritten.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        recorded = json.loads((out / record).read_text(encoding="utf-8"))["request"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{out} exists and was not created by this tool (it has no readable {record}).\n"
            "  Use another folder, or remove this one."
        ) from error
    if recorded != request:
        raise UserError(
            f"{out} was created for another request: {_words(recorded)}, now {_words(request)}.\n"
            "  Use another folder, or remove this one."
        )
    return True


@contextmanager
def complete_or_absent(out: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to ``out`` on success, and removed on an error.

    Raises:
        UserError: The disk is full or read-only, or the folder of ``out`` cannot be written to.
    """
    staging = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)  # left over from a killed run
    make_folder(out.parent, "the folder of OUT")
    with disk_errors_in_words(out.parent):
        try:
            staging.mkdir()
            yield staging
            staging.rename(out)  # an empty folder at out is replaced, a filled one is an error
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _words(request: Request) -> str:
    return ", ".join(f"{key} = {value}" for key, value in request.items())
