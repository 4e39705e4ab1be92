"""The command that verifies files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_moe.cli.options import JsonFlag, show
from megatron_moe.errors import CheckpointError

verifying = typer.Typer()


@verifying.command()
def verify(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="A run, a checkpoint, an export, a source or a plan."
        ),
    ],
    as_json: JsonFlag = False,
) -> None:
    """Read every file of a checkpoint, model or plan once and compare it with its checksum.

    Of a run, all checkpoints are verified, and of a plan, its solved matrices. A folder without
    checksums, such as a model of the Hub, is read too: sizes and headers must agree, and all values
    must be finite. Exits with status 2 if anything is damaged.

    Example: megatron-moe verify runs/demo
    """
    from megatron_moe.commands.verify import verify as story
    from megatron_moe.log import BytesProgress

    with BytesProgress("verify", rank=int(as_json)) as progress:
        results = story(folder, progress.show)
    if as_json:
        show([result.to_json() for result in results], as_json=True)
    else:
        for result in results:
            state = "damaged" if result.problems else "intact"
            size = f"{result.files} files, {result.num_bytes / 2**20:,.1f} MiB"
            print(f"{result.folder}: {state} ({size}; compared with {result.compared_with})")
    problems = [problem for result in results for problem in result.problems]
    if problems:
        raise CheckpointError("\n".join(problems))
