"""The command line: build a configuration from arguments, run a story, print user errors.

Heavy imports are inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from megatron_moe import __version__
from megatron_moe.cli.analyze import analyze
from megatron_moe.cli.evaluate import judging
from megatron_moe.cli.init import starting
from megatron_moe.cli.options import ConfigFile, JsonFlag, Overrides, Ranks, parse_size, show
from megatron_moe.cli.plan import planning, spec_with_note
from megatron_moe.cli.report import pages
from megatron_moe.cli.start import (
    joined_to,
    on_ranks,
    on_ranks_at_hand,
    position_of,
    resumable,
)
from megatron_moe.cli.verify import verifying
from megatron_moe.config.data import Mixing
from megatron_moe.config.run import Parallel, RunConfig
from megatron_moe.errors import ConfigError, JobError, UserError
from megatron_moe.experts.from_source import load_run
from megatron_moe.hf.disk import disk_errors_in_words, make_folder, naming
from megatron_moe.hf.spec import ModelSpec, read_spec
from megatron_moe.rules.check import check
from megatron_moe.rules.construction import measuring_violations
from megatron_moe.rules.installed import require_packages

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(judging)
app.add_typer(planning)
app.add_typer(starting)
app.add_typer(pages)
app.add_typer(verifying)
app.command()(analyze)

Routing = Literal["natural", "balanced"]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"megatron-moe {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Turn a dense Llama-family checkpoint into a Mixture-of-Experts and continue its pre-training.

    Every rank reads only its own shard of the checkpoint and builds its experts in place.
    """


@app.command()
def train(
    config_file: ConfigFile,
    overrides: Overrides = None,
    ranks: Ranks = None,
    dry: Annotated[
        bool,
        typer.Option("--dry-run", help="Train nothing: show what one rank of the job will hold."),
    ] = False,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="World size of the job. Requires --dry-run.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=0, help="Rank to show; default 0. Requires --dry-run.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Upcycle a dense checkpoint and continue its pre-training.

    One command for every scale: with --ranks it starts local ranks; under torchrun or SLURM it
    joins the job. With a run.dir that has a checkpoint, it resumes from the newest one. With
    --dry-run it builds what one rank of any world size will hold, without a GPU, and counts it.

    Example: megatron-moe train configs/demo.yaml train.steps=20 --ranks 4
    """
    config = load_run(config_file, overrides)
    from megatron_moe.commands.resuming import with_source

    config = with_source(config)
    if dry:
        spec = spec_with_note(config.source.path)
        _dry_run(config, spec, ranks, world_size, rank or 0, as_json=as_json)
        return
    read_spec(config.source.path)  # says at once what is missing
    if world_size is not None or rank is not None or as_json:
        raise ConfigError("--world-size, --rank and --json require --dry-run")
    require_packages(config)
    with resumable("run the same command to resume from the newest checkpoint"):
        on_ranks(_train, config, ranks)


def _dry_run(
    config: RunConfig,
    spec: ModelSpec,
    ranks: int | None,
    world_size: int | None,
    rank: int,
    *,
    as_json: bool,
) -> None:
    if ranks is not None or world_size is None:
        raise ConfigError(
            "--dry-run starts no ranks; it builds one rank of a job and needs --world-size\n"
            f"  --dry-run --world-size {ranks or 8}"
        )
    check(config, spec, world_size)

    from megatron_moe.runtime import cpu

    cpu.install()  # before Megatron-Core is imported
    from megatron_moe.commands.dry_run import dry_run, dry_run_report

    result = dry_run(config, rank=rank, world_size=world_size)
    show(result.to_json() if as_json else dry_run_report(result), as_json=as_json)


def _train(config: RunConfig, world: Any) -> None:
    from megatron_moe.commands.train import train
    from megatron_moe.runtime.launchers import ELASTIC, STOPPED

    if not train(config, world) and world.reports is None and ELASTIC in os.environ:
        sys.exit(STOPPED)


@app.command()
def export(
    source: Annotated[
        Path,
        typer.Argument(metavar="RUN_OR_CHECKPOINT", help="A run.dir, or one checkpoint in it."),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist yet.")],
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"] | None,
        typer.Option(help="dtype of the weights; default: the run's precision."),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Maximum size of a file, such as 500MB or 5GB.")
    ] = "5GB",
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Also upload it to this repository of the hub."),
    ] = None,
    dense: Annotated[
        bool, typer.Option("--dense", help="Write a model of one expert as a dense model.")
    ] = False,
) -> None:
    """Write a checkpoint as a Hugging Face MoE folder that transformers loads.

    Reads a checkpoint of any layout, expert by expert, in one process, without building a model.
    Adapters are added to their weights. The folder has a model card (README.md).

    Example: megatron-moe export runs/demo --out runs/demo/hf --dtype bf16
    """
    from megatron_moe.commands.hub import hub_for, push

    shard_bytes = parse_size(max_shard_size, option="--max-shard-size")
    hub = None if push_to_hub is None else hub_for(push_to_hub)
    from megatron_moe.commands.export import export_checkpoint, has_adapters  # imports torch

    architecture = export_checkpoint(
        source, out, dtype=dtype, max_shard_bytes=shard_bytes, name=push_to_hub, dense=dense
    )
    merged = ", with its adapters added to the weights" if has_adapters(source) else ""
    print(f"Wrote {out} ({architecture}){merged}")
    if push_to_hub is not None:
        print(f"Uploaded it to {push(hub, push_to_hub, out)}")


@app.command()
def tokenize(
    inputs: Annotated[
        list[Path],
        typer.Argument(help="JSONL, plain text, Parquet or Arrow files (.gz, .zst), or folders."),
    ],
    out: Annotated[Path, typer.Option(help="Prefix of the .bin/.idx pair to write.")],
    tokenizer: Annotated[Path, typer.Option(help="Folder that holds the tokenizer's files.")],
    workers: Annotated[int, typer.Option(min=1, help="Number of processes.")] = 1,
    text_key: Annotated[str, typer.Option(help="Key or column that holds the text.")] = "text",
    add_bos: Annotated[
        bool, typer.Option("--add-bos", help="Begin documents with the begin-of-text token.")
    ] = False,
    drop_duplicates: Annotated[
        bool, typer.Option("--drop-duplicates", help="Keep only the first of identical documents.")
    ] = False,
    min_tokens: Annotated[int, typer.Option(min=1, help="Skip shorter documents.")] = 1,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Skip longer documents.")] = None,
    max_malformed: Annotated[
        int, typer.Option(min=0, help="Number of malformed lines to skip before failing.")
    ] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Tokenize text into the .bin/.idx pair that data.path and Megatron-LM read.

    Streams its input. If interrupted, run the same command to resume.

    Example: megatron-moe tokenize corpus/ --tokenizer models/Llama-3-8B --out data/train
    """
    from megatron_moe.runtime import cpu
    from megatron_moe.runtime.world import resolve_device

    if resolve_device("auto") == "cpu":
        cpu.install()
    from megatron_moe.data.corpus import tokenize_files
    from megatron_moe.data.encode import Rules
    from megatron_moe.data.tokenizer import load_tokenizer

    rules = Rules(
        text_key=text_key,
        add_bos=add_bos,
        drop_duplicates=drop_duplicates,
        min_tokens=min_tokens,
        max_tokens=max_tokens,
    )
    with naming(out):
        report = tokenize_files(
            inputs,
            out,
            load_tokenizer(tokenizer),
            rules=rules,
            workers=workers,
            max_malformed=max_malformed,
        )
    counted = dataclasses.asdict(report)
    show(counted if as_json else _counts_text(counted, out), as_json=as_json)


def _counts_text(report: dict[str, Any], out: Path) -> str:
    lines = [f"{name.replace('_', ' ')}: {value:,}" for name, value in report["counts"].items()]
    speed = f"{report['seconds']:.1f} s, {report['tokens_per_second']:,.0f} tokens/s"
    names = [f"not read because of its name: {file}" for file in report["left_out"]]
    return "\n".join([f"{out}.bin, {out}.idx: {speed}", *lines, *report["malformed"], *names])


@app.command("reference-loss")
def reference_loss(
    config_file: ConfigFile,
    out: Annotated[Path, typer.Option(help="JSON file for data.mixing.reference_losses.")],
    overrides: Overrides = None,
) -> None:
    """Evaluate the dense model on each domain's held-out text, for an adaptive mixture.

    transformers loads the model on one device. A larger model with the same tokenizer can be the
    reference instead: source.path=models/larger.

    Example: megatron-moe reference-loss configs/seven-domains.yaml --out runs/reference.json
    """
    from megatron_moe.runtime.world import resolve_device, run_local_ranks

    config = load_run(config_file, overrides)
    mixing = Mixing(weights=config.data.mixing.weights)  # the file it names does not exist yet
    data = config.data.model_copy(update={"mixing": mixing})
    config = config.model_copy(update={"data": data, "parallel": Parallel()})
    check(config, read_spec(config.source.path), 1)
    make_folder(config.run.dir, "run.dir")
    device = resolve_device(config.run.device)
    run_local_ranks(partial(_reference_loss, config, out), ranks=1, device=device)


def _reference_loss(config: RunConfig, out: Path, world: Any) -> None:
    from megatron_moe.commands.reference_loss import reference_loss

    with disk_errors_in_words(out.parent):
        reference_loss(config, world, out)


@app.command()
def construct(
    config_file: ConfigFile,
    overrides: Overrides = None,
    ranks: Ranks = None,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Construct nothing: show its hours and memory.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Measure the dense model on text and write the plan file that train reads.

    Required for methods that use activations, for upcycle.fit, centroid routers and calibrated
    scales. If interrupted, run the same command to resume. --dry-run counts the work for the
    source's shape, and measures the speed of this machine for a second; --json needs it.

    Example: megatron-moe construct run.yaml upcycle.plan=runs/plan.safetensors --ranks 4
    """
    config = load_run(config_file, overrides)
    spec = spec_with_note(config.source.path) if dry else read_spec(config.source.path)
    if result := list(measuring_violations(config, spec)):
        raise ConfigError("\n".join(result))
    if dry:
        _construct_dry_run(config, spec, ranks or 1, as_json=as_json)
        return
    if as_json:
        raise ConfigError("--json requires --dry-run")
    from megatron_moe.construct.place import check_place

    check_place(config)
    with resumable("run the same command to resume from the newest finished part"):
        on_ranks_at_hand(_construct, config, ranks, overrides=overrides or [])


def _construct_dry_run(config: RunConfig, spec: ModelSpec, ranks: int, *, as_json: bool) -> None:
    from megatron_moe.commands.construct_cost import construct_cost, cost_report

    cost = construct_cost(config, spec, ranks)
    show(cost if as_json else cost_report(cost), as_json=as_json)


def _construct(config: RunConfig, world: Any) -> None:
    from megatron_moe.commands.construct import construct

    construct(config, world)


@app.command()
def bench(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CONFIG.yaml [key.path=value ...]", help="With --table: JSON records."
        ),
    ] = None,
    ranks: Ranks = None,
    steps: Annotated[int, typer.Option(min=1, help="Number of timed steps.")] = 20,
    warmup: Annotated[int, typer.Option(min=0, help="Number of untimed warm-up steps.")] = 5,
    routing: Annotated[
        Routing, typer.Option(help="Who chooses the experts: the router, or random numbers.")
    ] = "natural",
    random: Annotated[
        bool, typer.Option("--random", help="Random weights and tokens; needs only config.json.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="JSON file to write; default RUN.DIR/bench-ROUTING.json.")
    ] = None,
    table: Annotated[bool, typer.Option("--table", help="Print records as Markdown.")] = False,
    collectives: Annotated[
        bool, typer.Option("--collectives", help="Time collectives by size, without a model.")
    ] = False,
    largest_mib: Annotated[
        int, typer.Option(min=1, help="Largest size in MiB. Requires --collectives.")
    ] = 256,
    sweep: Annotated[
        Path | None, typer.Option(help="Print the command that launches each run in this file.")
    ] = None,
) -> None:
    """Time training steps of a configuration, by phase.

    Writes one JSON record with everything that is needed to repeat the measurement. Layout and
    capacity are those of the configuration; moe.moe_expert_capacity_factor=null drops no token.

    Example: megatron-moe bench configs/demo.yaml --ranks 4 --random --routing balanced
    """
    from megatron_moe.bench.record import read_record
    from megatron_moe.bench.sweep import commands as sweep_commands
    from megatron_moe.bench.sweep import read_sweep
    from megatron_moe.bench.table import tables

    given = arguments or []
    if sum((table, collectives, sweep is not None, bool(given) and not table)) != 1:
        raise ConfigError(
            "bench needs one of CONFIG.yaml, --table RECORDS, --collectives and --sweep FILE"
        )
    if table:
        print(tables(read_record(Path(name)) for name in given), end="")
    elif sweep is not None:
        print("\n".join(sweep_commands(read_sweep(sweep))))
    elif collectives:
        story = partial(_collectives, largest_mib, out or Path("collectives.json"))
        joined_to(position_of(ranks), story, ranks=ranks or 1, device="auto")
    else:
        config = load_run(Path(given[0]), given[1:])
        options = {"steps": steps, "warmup": warmup, "routing": routing, "random": random}
        path = out or config.run.dir / f"bench-{routing}.json"
        on_ranks(partial(_bench, options, path), config, ranks)


def _bench(options: dict[str, Any], out: Path, config: RunConfig, world: Any) -> None:
    from megatron_moe.bench.steps import BenchOptions
    from megatron_moe.commands.bench import bench as measure

    _keep(measure(config, world, BenchOptions(**options)), world, out)


def _collectives(largest_mib: int, out: Path, world: Any) -> None:
    from megatron_moe.bench.collectives import bench_collectives

    _keep(bench_collectives(world, largest_bytes=largest_mib * 2**20), world, out)


def _keep(record: Any, world: Any, out: Path) -> None:
    """Write and print a record on rank 0."""
    from megatron_moe.bench.record import write_record
    from megatron_moe.bench.table import tables

    if world.rank == 0:
        with disk_errors_in_words(out.parent):
            write_record(record, out)
        print(f"{tables([record])}\n{out}", flush=True)


@app.command()
def schema() -> None:
    """Print a JSON schema of the configuration, with which editors complete and check YAML files.

    VS Code (YAML extension) and other editors with yaml-language-server read it from a first line
    "# yaml-language-server: $schema=run.schema.json" in the YAML file.

    Example: megatron-moe schema > run.schema.json
    """
    from megatron_moe.config.schema import json_schema

    print(json.dumps(json_schema(), indent=2))


def main() -> None:
    """Run the command line and exit.

    The status is 2 if the user has to correct something, and 1 if a job was lost, which launchers
    may restart.
    """
    for stream in (sys.stdout, sys.stderr):  # names of files may be no text of the terminal
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with disk_errors_in_words(Path.cwd()):
            app()
    except UserError as error:
        kind = type(error).__name__
        for line in str(error).splitlines():
            head = "" if line.startswith(" ") else f"{kind}: "
            print(head + line, file=sys.stderr)
        sys.exit(1 if isinstance(error, JobError) else 2)
