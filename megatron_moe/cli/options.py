"""What commands of several files share: arguments, and how a report is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The run's YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[key.path=value ...]", help="Settings that win over the file, e.g. train.steps=20."
    ),
]
Ranks = Annotated[
    int | None,
    typer.Option(min=1, help="Start this many ranks on this machine. Not under torchrun or SLURM."),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")]


def show(report: Any, *, as_json: bool) -> None:
    """Print a report: an object for scripts, or what rich makes of it."""
    from megatron_moe.log import console

    print(json.dumps(report, indent=2)) if as_json else console.print(report)
