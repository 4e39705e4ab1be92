"""The commands that judge a model by what it says: evaluate and generate."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_moe.cli_options import JsonFlag, Ranks, show
from megatron_moe.start import on_ranks, place_of

judging = typer.Typer()


@judging.command()
def evaluate(
    source: Annotated[
        Path,
        typer.Argument(metavar="RUN_OR_CHECKPOINT", help="A run.dir, or one checkpoint in it."),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[key.path=value ...]",
            help="Settings that win over the run's, such as another layout.",
        ),
    ] = None,
    ranks: Ranks = None,
    as_json: JsonFlag = False,
) -> None:
    """Judge a model: loss, perplexity and bits per byte on the run's held-out text, by domain.

    Of the dense model, of the MoE before its first step, and of the checkpoint, under the run's
    layout or any other. Written to run.dir/evaluation/step-N.json.

    Example: megatron-moe evaluate runs/demo parallel.expert_parallel_size=1
    """
    from megatron_moe.checkpoint.folder import run_of
    from megatron_moe.evaluate.losses import judging

    checkpoint, config = run_of(source, overrides or [])
    place = place_of(ranks)
    world_size = place.size if place is not None else ranks or 1
    on_ranks(partial(_evaluate, checkpoint, as_json), judging(config, world_size), ranks)


def _evaluate(checkpoint: Path, as_json: bool, config: Any, world: Any) -> None:
    from megatron_moe.evaluate.losses import evaluate as story
    from megatron_moe.evaluate.record import evaluation_report, write_record
    from megatron_moe.log import console

    found = story(config, world, checkpoint)
    if world.rank:
        return
    path = config.run.dir / "evaluation" / f"step-{found.step:06d}.json"
    write_record(path, found.to_json())
    show(found.to_json() if as_json else evaluation_report(found), as_json=as_json)
    if not as_json:
        console.print(f"wrote {path}")
