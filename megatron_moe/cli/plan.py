"""The commands that predict: from a model and a number of GPUs to a layout, without a GPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from megatron_moe.cli.options import JsonFlag, parse_size, show
from megatron_moe.config.load import overridden
from megatron_moe.config.run import RunConfig
from megatron_moe.data.files import text_exists
from megatron_moe.errors import ConfigError
from megatron_moe.experts.from_source import load_run
from megatron_moe.hf.disk import write_text
from megatron_moe.hf.known import model_named
from megatron_moe.hf.planned import spec_to_plan
from megatron_moe.hf.spec import ModelSpec, spec_from_config

planning = typer.Typer()

GpuName = Annotated[str, typer.Option(help="GPU model: a100, h100, h200 or b200.")]


@planning.command()
def plan(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG.yaml] [key.path=value ...]",
            help="A run, and overrides of its settings.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A known model instead of CONFIG: llama-3-8b."),
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs.")] = 8,
    gpu: GpuName = "h100",
    check_only: Annotated[
        bool, typer.Option("--check", help="Explain the layout in CONFIG instead of searching.")
    ] = False,
    price: Annotated[
        float | None, typer.Option(min=0, help="Price of a GPU-hour, for the cost of the run.")
    ] = None,
    mtbf: Annotated[
        float | None,
        typer.Option(help="Hours between failures of the whole job. Default: 50,000 / GPUs."),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Bytes per second that all ranks write. Default: 2GB a node."
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Also write the plan as a page.")
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="Fit the time model to RECORD.json ... of bench instead."),
    ] = False,
    constants: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Constants to use; with --calibrate: file to write."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Find the fastest layout that fits, or explain one, before you queue a job.

    Needs no GPU, and no weights: the model's config.json, or the name of a known model, is enough.
    With --check, the exit status is 1 if the layout is illegal. docs/planning.md describes the
    model behind the prediction and its accuracy.

    Example: megatron-moe plan --model llama-3-8b --gpus 128
    """
    if calibrate:
        _calibrate([Path(name) for name in arguments or []], constants, as_json=as_json)
        return
    from megatron_moe.commands import plan as story
    from megatron_moe.planner.calibration import FITTED, read_constants
    from megatron_moe.planner.whole_run import Circumstances

    rate = None if storage is None else parse_size(storage.removesuffix("/s"), option="--storage")
    circumstances = Circumstances(
        mtbf_hours=_positive(mtbf, option="--mtbf"), storage_bytes_per_second=rate, price=price
    )
    config, spec = _run_to_plan(arguments or [], model, gpus=gpus, gpu=gpu)
    fitted = FITTED if constants is None else read_constants(constants)
    options = {"gpus": gpus, "gpu": gpu, "check_only": check_only, "constants": fitted}
    planned = story.plan(config, spec, circumstances, **options)
    show(planned.to_json() if as_json else planned.tables(), as_json=as_json)
    if report is not None:
        planned.write_page(report)
        print(report, file=sys.stderr)
    if not planned.legal:
        raise typer.Exit(1)


def _calibrate(records: list[Path], out: Path | None, *, as_json: bool) -> None:
    from megatron_moe.commands.calibrate import calibrate

    result = calibrate(records)
    if out is not None:
        write_text(out, json.dumps(result.to_json(), indent=2) + "\n")
    show(result.to_json() if as_json else result.tables(), as_json=as_json)


def _positive(value: float | None, *, option: str) -> float | None:
    if value is not None and not 0 < value < float("inf"):
        raise ConfigError(f"{option} ({value}) must be a positive number of hours")
    return value


def _run_to_plan(
    arguments: list[str], model: str | None, *, gpus: int, gpu: str
) -> tuple[RunConfig, ModelSpec]:
    """Return the run of CONFIG, or the one that `init` would start from a known model."""
    if model is not None:
        if files := [word for word in arguments if "=" not in word]:
            raise ConfigError(
                f"plan takes --model ({model}) or a configuration ({files[0]}), not both.\n"
                "  remove one of them"
            )
        spec, source = known_source(model)
        from megatron_moe.planner.starting import Request, starting_config

        start = starting_config(Request(source=source, gpus=gpus, gpu=gpu), spec)
        return overridden(start, arguments), spec
    if not arguments or "=" in arguments[0]:
        raise ConfigError("plan needs CONFIG.yaml, or --model NAME of a known model")
    config = load_run(Path(arguments[0]), arguments[1:])
    spec = spec_with_note(config.source.path)
    for note in plan_notes(config, gpus=gpus, gpu=gpu):
        print(note, file=sys.stderr)
    return config, spec


def plan_notes(config: RunConfig, *, gpus: int, gpu: str) -> Iterator[str]:
    """Yield what a prediction leaves out of a run: its device, and text that is not there yet."""
    if config.run.device == "cpu":
        yield (
            f"run.device is cpu, but plan predicts {gpus} {gpu}: it has no model of CPUs. "
            "Choose GPUs with --gpus and --gpu."
        )
    for setting, value in (
        ("train.fp8", config.train.fp8),
        ("train.delay_wgrad_compute", config.train.delay_wgrad_compute),
        ("moe.moe_shared_expert_overlap", config.moe.moe_shared_expert_overlap),
    ):
        if value:
            yield (
                f"{setting} ({value}) is not in the prediction, which is that of the run without "
                "it: nobody has measured its speed and memory with this package."
            )
    texts = {"data.path": config.data.path, "data.validation_path": config.data.validation_path}
    texts |= {
        f"data.domains.{name}.path": one.path for name, one in (config.data.domains or {}).items()
    }
    for setting, path in texts.items():
        if path is not None and not text_exists(path):
            yield (
                f"{setting} ({path}) does not exist yet, so the plan cannot say how often it is "
                "read."
            )


def known_source(name: str) -> tuple[ModelSpec, Path]:
    """Return the shape of a known model, dense or MoE, and the folder it is usually kept in.

    Raises:
        ConfigError: No known model has the name.
    """
    known = model_named(name)
    return spec_from_config(known.config, where=known.name), Path("models") / known.folder_name


def spec_with_note(folder: Path) -> ModelSpec:
    """Return the shape of the source; say on standard error if the folder is missing."""
    spec, note = spec_to_plan(folder)
    if note is not None:
        print(note, file=sys.stderr)
    return spec


@planning.command()
def flops(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="Folder with a config.json, a run's YAML file, or a known model's name.",
        ),
    ],
    sequence: Annotated[int | None, typer.Option(min=1, help="Sequence length in tokens.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Count the parameters and matrix-product FLOPs of a dense or MoE model.

    Example: megatron-moe flops mixtral-8x7b --sequence 4096
    """
    from megatron_moe.planner.count import count
    from megatron_moe.planner.tables import counts_report

    counts = count(source, sequence_length=sequence)
    show(counts.to_json() if as_json else counts_report(counts), as_json=as_json)
