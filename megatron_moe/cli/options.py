"""Arguments that several commands share, and how they print reports."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_moe.errors import ConfigError

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The run's YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[key.path=value ...]",
        help="Settings that override those of the file or run: train.steps=20.",
    ),
]
Ranks = Annotated[
    int | None,
    typer.Option(min=1, help="Ranks to start on this machine; not under torchrun or SLURM."),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts.")]


def show(report: Any, *, as_json: bool) -> None:
    """Print a report: JSON for scripts, or a rich renderable for people."""
    from megatron_moe.log import console

    print(json.dumps(report, indent=2)) if as_json else console.print(report)


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
          "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}  # fmt: skip


def parse_size(text: str, *, option: str) -> int:
    """Return the bytes of a size such as ``5GB`` or ``500 MiB``.

    Raises:
        ConfigError: The text is not a size of at least one byte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    size = int(float(match[1]) * _UNITS.get(match[2], 0)) if match else 0
    if size < 1:
        raise ConfigError(f"{option} ({text}) must be a size, such as 500MB, 5GB or 2GiB")
    return size


_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def parse_count(text: str, *, option: str) -> int:
    """Return a number of tokens such as ``100B`` or ``1.5T``.

    Raises:
        ConfigError: The text is not a number of at least one.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]?)", text.strip().lower())
    count = int(float(match[1]) * _COUNTS.get(match[2], 0)) if match else 0
    if count < 1:
        raise ConfigError(f"{option} ({text}) must be a number of tokens, such as 500M, 100B or 2T")
    return count
