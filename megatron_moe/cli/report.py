"""The commands that write pages about runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

pages = typer.Typer()


@pages.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run.dir of a job.")],
) -> None:
    """Write RUN/report.html: what a run did so far, on one page that opens anywhere, offline.

    Shows what metrics.jsonl, receipt.json, evaluation/ and analysis/ hold, and says of what is
    missing which command brings it.

    Example: megatron-moe report runs/demo
    """
    from megatron_moe.commands import report as story

    print(story.report(run))


@pages.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN ...", help="Their run.dirs.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("compare.html"),
) -> None:
    """Write one page with several runs over each other, and what is set differently.

    Example: megatron-moe compare runs/copy runs/granular --out methods.html
    """
    from megatron_moe.commands import report as story

    print(story.compare(runs, out))
