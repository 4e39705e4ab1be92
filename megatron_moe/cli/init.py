"""``megatron-moe init``: arguments, and questions for those that are missing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from megatron_moe.cli.options import parse_count
from megatron_moe.cli.plan import known_source
from megatron_moe.errors import ConfigError
from megatron_moe.hf.spec import ModelSpec, read_spec

starting = typer.Typer()

GpuChoice = Literal["a100", "h100", "h200", "b200", "cpu"]


@starting.command()
def init(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="SOURCE", help="Folder of a dense or MoE model, or a known name: llama-3-8b."
        ),
    ] = None,
    experts: Annotated[
        int | None, typer.Option(min=1, help="Experts per layer; default: 8, or a MoE's own.")
    ] = None,
    topk: Annotated[
        int | None, typer.Option(min=1, help="Experts per token; default: 2, or a MoE's own.")
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Number of GPUs, or of ranks with --gpu cpu.")
    ] = None,
    gpu: Annotated[GpuChoice, typer.Option(help="GPU model; cpu: this machine.")] = "h100",
    tokens: Annotated[
        str | None,
        typer.Option(metavar="COUNT", help="Tokens to train on: 100B. Without a GPU: 20 steps."),
    ] = None,
    sequence: Annotated[int | None, typer.Option(min=1, help="Tokens of a sequence.")] = None,
    data: Annotated[Path, typer.Option(help="Training text or tokens.")] = Path("data/train"),
    engine: Annotated[
        Literal["auto", "torch", "transformer_engine"],
        typer.Option(help="auto: a layout that fits with and without Transformer Engine."),
    ] = "auto",
    out: Annotated[Path, typer.Option(help="YAML file to write.")] = Path("run.yaml"),
) -> None:
    """Write the YAML file of a run, with the planner's best layout, and name the next commands.

    Needs neither a GPU nor, for a known model, a download. In a terminal it asks for what is
    missing; otherwise SOURCE is required, --gpus is 8, and it prints only the name of the file.

    Example: megatron-moe init llama-3-8b --gpus 128 --tokens 100B --out run.yaml
    """
    asks = sys.stdin.isatty() and sys.stdout.isatty()
    if asks and (source is None or gpus is None):
        source, gpus, tokens = _asked(source, gpus, tokens, gpu)
    if source is None:
        raise ConfigError("init needs SOURCE: a folder of a model, or a known model's name")
    from megatron_moe.commands import init as story
    from megatron_moe.planner.starting import Request, name_of

    spec, folder = source_model(source)
    request = Request(
        source=folder,
        gpus=gpus or 8,
        gpu=gpu,
        experts=experts,
        topk=topk,
        tokens=None if tokens is None else parse_count(tokens, option="--tokens"),
        sequence_length=sequence,
        engine=engine,
        data=data,
        run_dir=Path("runs") / f"{folder.name.lower()}-{name_of(spec, experts, topk)}",
    )
    commands = story.init(request, spec, out)
    print("\n".join([f"Wrote {out}. Next:", *(f"  {c}" for c in commands)]) if asks else out)


def source_model(source: str) -> tuple[ModelSpec, Path]:
    """Return the shape and the folder of a model, which may not have been downloaded yet.

    Raises:
        ConfigError: It is neither a folder nor the name of a known model.
        CheckpointError: The folder's model cannot be upcycled.
    """
    folder = Path(source)
    if folder.is_dir():
        return read_spec(folder), folder
    return known_source(source)


def _asked(
    source: str | None, gpus: int | None, tokens: str | None, gpu: str
) -> tuple[str, int, str | None]:
    """Ask on the terminal for what the arguments leave open."""
    from rich.prompt import IntPrompt, Prompt

    while source is None:
        answer = Prompt.ask("Source model (a folder, or a name such as llama-3-8b)")
        try:
            source_model(answer)
            source = answer
        except ConfigError as error:
            print(error)
    if gpus is None:
        gpus = IntPrompt.ask("Number of ranks" if gpu == "cpu" else f"Number of {gpu}", default=8)
    if tokens is None and gpu != "cpu":
        tokens = Prompt.ask("Tokens to train on", default="100B")
    return source, gpus, tokens
