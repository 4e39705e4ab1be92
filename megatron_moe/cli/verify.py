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
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH", help="A run, a checkpoint, an export, a Hugging Face folder or a plan."
        ),
    ],
    as_json: JsonFlag = False,
) -> None:
    """Find damaged, missing and unlisted files by reading every file once.

    A checkpoint and an export have a file CHECKSUMS, with which every byte of their files is
    compared; a file that it does not list is reported. A plan (plan.safetensors, or the folder of
    its matrices) has hashes of its own. A Hugging Face folder has no checksums: its headers must
    fit its files, and all values must be finite, but a changed number is not noticed.

    For a run, this checks all checkpoints, the step that checkpoints/latest names (a resume starts
    there), the plan, and the source model if it is still there. Nothing is changed.

    Prints one line per folder, then all problems. The exit status is 0 if there are no problems,
    and 2 if there is one or PATH cannot be verified. Notes do not change it.

    Example: megatron-moe verify runs/demo && megatron-moe export runs/demo --out runs/demo/hf
    """
    from megatron_moe.commands.verify import verify as story
    from megatron_moe.log import BytesProgress

    with BytesProgress("verify", rank=int(as_json)) as progress:
        results = story(path, progress.show)
    if as_json:
        show([result.to_json() for result in results], as_json=True)
    else:
        for result in results:
            print(result.summary())
            print("".join(f"  note: {note}\n" for note in result.notes), end="")
    problems = [problem for result in results for problem in result.problems]
    if problems:
        raise CheckpointError("\n".join(problems))
