"""Arguments that several commands share, and how they print reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The run's YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[key.path=value ...]", help="Settings that override the file: train.steps=20."
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
