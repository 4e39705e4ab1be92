"""The commands that judge a model by what it says: evaluate and generate."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_moe.cli.options import JsonFlag, Ranks, show
from megatron_moe.cli.start import on_ranks, position_of
from megatron_moe.errors import ConfigError

judging = typer.Typer()


@judging.command(context_settings={"ignore_unknown_options": True})
def evaluate(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_OR_CHECKPOINT",
            help="A run.dir, or one checkpoint in it; with --tasks also an exported folder.",
        ),
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[key.path=value ...]",
            help="Settings that win over the run's, such as another layout. With --tasks: options "
            "of lm-eval run.",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME",
            help="Run these tasks of lm-evaluation-harness instead; llama-moe and llama3-moe are "
            "the suites of the papers.",
        ),
    ] = None,
    ranks: Ranks = None,
    as_json: JsonFlag = False,
) -> None:
    """Judge a model: loss, perplexity and bits per byte on the run's held-out text, by domain.

    Of the dense model, of the MoE before its first step, and of the checkpoint, under the run's
    layout or any other. Written to run.dir/evaluation/. With --tasks the checkpoint is exported to
    a temporary folder, and the harness asks it questions.

    Example: megatron-moe evaluate runs/demo parallel.expert_parallel_size=1
    """
    if tasks is not None:
        _on_tasks(source, tasks.split(","), arguments or [], ranks, as_json=as_json)
        return
    from megatron_moe.checkpoint.folder import run_of
    from megatron_moe.config.judging import judging

    if options := [word for word in arguments or [] if word.startswith("-")]:
        raise ConfigError(f"evaluate has no option {options[0]}; those of lm-eval need --tasks")
    checkpoint, config = run_of(source, arguments or [])
    place = position_of(ranks)
    world_size = place.size if place is not None else ranks or 1
    on_ranks(partial(_evaluate, checkpoint, as_json), judging(config, world_size), ranks)


def _on_tasks(
    source: Path, tasks: list[str], options: list[str], ranks: int | None, *, as_json: bool
) -> None:
    if ranks is not None:
        raise ConfigError(
            "--ranks is not for --tasks: the harness runs transformers, not this trainer.\n"
            "  for several GPUs: --model_args parallelize=True"
        )
    from megatron_moe.commands.exported import exported
    from megatron_moe.evaluate.harness import file_of, run_tasks, tasks_report
    from megatron_moe.evaluate.record import write_record
    from megatron_moe.log import console

    with exported(source) as model:
        record = run_tasks(model, tasks, options)
        path = file_of(model, tasks)
    write_record(path, record)
    show(record if as_json else tasks_report(record), as_json=as_json)
    if not as_json:
        console.print(f"wrote {path}")


@judging.command()
def generate(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_OR_CHECKPOINT", help="A run.dir, a checkpoint, or an exported folder."
        ),
    ],
    prompts: Annotated[
        list[str], typer.Argument(metavar="PROMPT ...", help="Texts to go on with.")
    ],
    new_tokens: Annotated[int, typer.Option(min=1, help="How long to go on at most.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0, help="Of the draws; 0 takes the likeliest token always.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Let a model go on with a text, for a quick look at it.

    A checkpoint is exported to a temporary folder first; transformers loads it, on a GPU where
    there is one. Two calls with one seed draw the same.

    Example: megatron-moe generate runs/demo "The capital of France is" --temperature 0.8
    """
    from megatron_moe.commands.exported import exported
    from megatron_moe.evaluate.speak import completions, load_model
    from megatron_moe.runtime.world import resolve_device

    with exported(source) as found:
        model = load_model(found.folder, device=resolve_device("auto"))
        texts = completions(
            model,
            found.folder,
            prompts,
            new_tokens=new_tokens,
            temperature=temperature,
            seed=seed,
        )
        if as_json:
            show(
                [{"prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)],
                as_json=True,
            )
        else:
            for text in texts:
                print(f"{text}\n", flush=True)


def _evaluate(checkpoint: Path, as_json: bool, config: Any, world: Any) -> None:
    from megatron_moe.commands.evaluate import evaluate as story
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
