"""The commands evaluate and generate."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_moe.cli.options import JsonFlag, Ranks, show
from megatron_moe.cli.start import on_ranks_at_hand, position_of
from megatron_moe.errors import ConfigError

judging = typer.Typer()


@judging.command(context_settings={"ignore_unknown_options": True})
def evaluate(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_OR_CHECKPOINT",
            help="Run directory or checkpoint; with --tasks also an exported folder.",
        ),
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[key.path=value ...]",
            help="Settings that override the run's, such as another layout. With --tasks: options "
            "of lm-eval run.",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME",
            help="Run these tasks of lm-evaluation-harness instead. llama-moe and llama3-moe are "
            "the papers' suites.",
        ),
    ] = None,
    ranks: Ranks = None,
    as_json: JsonFlag = False,
) -> None:
    """Report loss, perplexity and bits per byte on the run's held-out text, by domain.

    Evaluates the source model, the MoE before its first step, and the checkpoint, under the run's
    layout or any other, and writes the results to run.dir/evaluation/. With --tasks it exports the
    checkpoint to a temporary folder and runs lm-evaluation-harness on it.

    Example: megatron-moe evaluate runs/demo parallel.expert_parallel_size=1
    """
    if tasks is not None:
        _on_tasks(source, tasks.split(","), arguments or [], ranks, as_json=as_json)
        return
    from megatron_moe.checkpoint.folder import run_of
    from megatron_moe.config.judging import judging

    if options := [word for word in arguments or [] if word.startswith("-")]:
        raise ConfigError(f"evaluate has no option {options[0]}: lm-eval's options require --tasks")
    checkpoint, config = run_of(source, arguments or [])
    position = position_of(ranks)
    world_size = position.size if position is not None else ranks or 1
    story = partial(_evaluate, checkpoint, as_json)
    on_ranks_at_hand(story, judging(config, world_size), ranks, overrides=arguments or [])


def _on_tasks(
    source: Path, tasks: list[str], options: list[str], ranks: int | None, *, as_json: bool
) -> None:
    if ranks is not None:
        raise ConfigError(
            "--ranks cannot be combined with --tasks: the harness runs one process.\n"
            "  use --model_args parallelize=True for several GPUs"
        )
    from megatron_moe.commands.exported import exported
    from megatron_moe.evaluate.harness import results_path, run_tasks, tasks_report
    from megatron_moe.evaluate.record import write_record
    from megatron_moe.log import console

    with exported(source) as model:
        record = run_tasks(model, tasks, options)
        path = results_path(model, tasks)
    write_record(path, record)
    show(record if as_json else tasks_report(record), as_json=as_json)
    if not as_json:
        console.print(f"wrote {path}")


@judging.command()
def generate(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_OR_CHECKPOINT", help="Run directory, checkpoint, or exported folder."
        ),
    ],
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT ...", help="Texts to complete.")],
    new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of new tokens.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0, help="Sampling temperature; 0 means greedy decoding.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Complete texts with a model, for a quick look at it.

    Exports a checkpoint to a temporary folder and loads it with transformers, on a GPU if there is
    one. The same seed gives the same texts.

    Example: megatron-moe generate runs/demo "The capital of France is" --temperature 0.8
    """
    if not all(prompts):
        raise ConfigError("PROMPT must not be empty: a model continues text.\n  give some text")
    from megatron_moe.commands.exported import exported
    from megatron_moe.evaluate.speak import completions
    from megatron_moe.hf.load import load_model
    from megatron_moe.runtime.world import resolve_device

    with exported(source) as result:
        model = load_model(result.folder, device=resolve_device("auto"))
        texts = completions(
            model,
            result.folder,
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

    result = story(config, world, checkpoint)
    if world.rank:
        return
    path = config.run.dir / "evaluation" / f"step-{result.step:06d}.json"
    write_record(path, result.to_json())
    show(result.to_json() if as_json else evaluation_report(result), as_json=as_json)
    if not as_json:
        console.print(f"wrote {path}")
