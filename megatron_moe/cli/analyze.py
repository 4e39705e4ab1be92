"""The command analyze."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_moe.cli.options import JsonFlag, Overrides, Ranks, show
from megatron_moe.cli.start import on_ranks_at_hand, position_of
from megatron_moe.errors import ConfigError


def analyze(
    source: Annotated[
        Path,
        typer.Argument(metavar="RUN_OR_CHECKPOINT", help="Run directory or checkpoint."),
    ],
    overrides: Overrides = None,
    ranks: Ranks = None,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=FILE", help="Another text to compare with the run's domains."
        ),
    ] = None,
    all_steps: Annotated[
        bool, typer.Option("--all-steps", help="Analyze every checkpoint of the run.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show which experts the tokens of each domain go to, and how experts differ.

    Runs the checkpoint on the run's held-out text (data.validation_samples sequences per domain),
    under the run's layout or another, and writes run.dir/analysis/step-N.json.

    Example: megatron-moe analyze runs/demo parallel.expert_parallel_size=1 --ranks 1
    """
    from megatron_moe.checkpoint.folder import complete, run_of
    from megatron_moe.config.judging import judging

    checkpoint, config = run_of(source, overrides or [])
    checkpoints = [checkpoint]
    if all_steps:
        if (source / "checkpoint.json").exists():
            raise ConfigError(f"--all-steps needs a run directory; {source} is a single checkpoint")
        checkpoints = complete(source)
    named = dict(map(_named, sets or []))
    position = position_of(ranks)
    world_size = position.size if position is not None else ranks or 1
    story = partial(_analyze, checkpoints, named, as_json)
    on_ranks_at_hand(story, judging(config, world_size), ranks, overrides=overrides or [])


def _named(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise ConfigError(f"--set {text} is not of the form NAME=FILE")
    return name, Path(path)


def _analyze(
    checkpoints: list[Path], sets: dict[str, Path], as_json: bool, config: Any, world: Any
) -> None:
    from megatron_moe.analyze.record import to_json
    from megatron_moe.analyze.table import analysis_report
    from megatron_moe.commands.analyze import analyze as story
    from megatron_moe.log import console

    quiet = as_json or world.rank > 0
    result = story(config, world, checkpoints, sets=sets, say=_nothing if quiet else console.print)
    if world.rank:
        return
    if as_json:
        values = [to_json(analysis) for analysis in result]
        show({"analyses": values} if len(checkpoints) > 1 else values[0], as_json=True)
    for analysis in result if not as_json else ():
        show(analysis_report(analysis), as_json=False)


def _nothing(text: str) -> None:
    """Print nothing."""
