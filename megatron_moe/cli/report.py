"""The commands that write pages about runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

pages = typer.Typer()


@pages.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")],
) -> None:
    """Write RUN/report.html: what a run did so far, on one page that works offline.

    Shows metrics.jsonl, receipt.json, evaluation/ and analysis/, and names the command that
    produces anything missing.

    Example: megatron-moe report runs/demo
    """
    from megatron_moe.commands import report as story

    print(story.report(run))


@pages.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN ...", help="Run directories.")],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("compare.html"),
) -> None:
    """Write one page that compares several runs and lists their differing settings.

    Example: megatron-moe compare runs/copy runs/granular --out methods.html
    """
    from megatron_moe.commands import report as story

    print(story.compare(runs, out))
