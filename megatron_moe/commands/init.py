"""The story of ``megatron-moe init``: from a model and a number of GPUs to a run's YAML file."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

from megatron_moe.commands.init_file import Draft, as_yaml
from megatron_moe.config.run import RunConfig
from megatron_moe.data.files import text_exists
from megatron_moe.errors import ConfigError
from megatron_moe.hf.disk import write_text
from megatron_moe.hf.obtain import how_to_get
from megatron_moe.hf.spec import ModelSpec
from megatron_moe.planner.calibration import FITTED
from megatron_moe.planner.check import predict_candidate
from megatron_moe.planner.hardware import gpu_named
from megatron_moe.planner.layer import Machine
from megatron_moe.planner.relief import searched
from megatron_moe.planner.search import Candidate, NothingFitsError, configured
from megatron_moe.planner.shape import run_shape
from megatron_moe.planner.starting import Request, starting_config
from megatron_moe.planner.whole_run import Circumstances, whole_run
from megatron_moe.rules.check import check

GPUS_PER_NODE = 8


def init(request: Request, spec: ModelSpec, out: Path) -> list[str]:
    """Write the YAML file of a new run to ``out`` and return the next commands.

    Raises:
        ConfigError: ``out`` exists, a value is not valid, or no layout is legal or fits.
    """
    if out.exists():
        raise ConfigError(f"--out ({out}) exists already.\n  choose another file, or remove it")
    draft = drafted(request, spec)
    commands = next_commands(request, out)
    write_text(out, as_yaml(draft, request, spec, commands))
    return commands


def drafted(request: Request, spec: ModelSpec) -> Draft:
    """Choose all settings of a new run.

    Raises:
        ConfigError: A value is not valid, or no layout is legal or fits.
    """
    config = starting_config(request, spec)
    if request.on_cpu:
        check(config, spec, request.gpus)
        return Draft(config, None, None)
    config, candidate = _with_best_layout(config, request, spec)
    predicted = whole_run(config, spec, candidate, Circumstances())
    interval = min(predicted.best_interval, config.train.steps)
    checkpoint = config.checkpoint.model_copy(update={"interval": interval})
    config = config.model_copy(update={"checkpoint": checkpoint})
    return Draft(config, candidate, whole_run(config, spec, candidate, Circumstances()))


def _with_best_layout(
    config: RunConfig, request: Request, spec: ModelSpec
) -> tuple[RunConfig, Candidate]:
    """Return the run with the fastest layout that fits with the engine, or with both for auto.

    If nothing fits with both, the run names Transformer Engine, which recomputes more.
    """
    if config.run.engine != "auto":
        return _applied(config, _search(config, request, spec)[0])
    try:
        with_torch = _search(_with_engine(config, "torch"), request, spec)
    except NothingFitsError:
        with_torch = []
    shape = run_shape(config, spec)
    machine = Machine(gpu_named(request.gpu), FITTED)
    for one in with_torch:
        work = replace(one.work, engine="transformer_engine")
        candidate = predict_candidate(shape, work, one.degrees, machine)
        if candidate.memory.total <= machine.gpu.usable_gib:
            return _applied(config, candidate)
    config = _with_engine(config, "transformer_engine")
    return _applied(config, _search(config, request, spec)[0])


def _search(config: RunConfig, request: Request, spec: ModelSpec) -> list[Candidate]:
    return list(searched(config, spec, gpus=request.gpus, gpu=request.gpu).best)


def _with_engine(config: RunConfig, engine: str) -> RunConfig:
    return config.model_copy(update={"run": config.run.model_copy(update={"engine": engine})})


def _applied(config: RunConfig, candidate: Candidate) -> tuple[RunConfig, Candidate]:
    config = configured(config, candidate.degrees, candidate.work)
    train = config.train.model_copy(update={"recompute": candidate.work.recompute})
    return config.model_copy(update={"train": train}), candidate


def next_commands(request: Request, out: Path) -> list[str]:
    """Return the commands to type next, in order."""
    commands: list[str] = []
    if not (request.source / "config.json").exists():
        first = how_to_get(request.source).splitlines()[0]
        commands.append(first.removeprefix("  get it:").strip())
    if not text_exists(request.data):
        words = ["tokenize", "TEXT.jsonl", "--tokenizer", request.source, "--out", request.data]
        commands.append(_command("megatron-moe", *words))
    if request.on_cpu:
        commands.append(_command("megatron-moe", "train", out, "--ranks", request.gpus))
    else:
        gpus = ("--gpus", request.gpus, "--gpu", request.gpu)
        commands += [
            _command("megatron-moe", "plan", out, *gpus, "--check"),
            _command("megatron-moe", "train", out, "--dry-run", "--world-size", request.gpus),
            _launch(request.gpus, out),
        ]
    export = request.run_dir / "hf"
    return [*commands, _command("megatron-moe", "export", request.run_dir, "--out", export)]


def _command(*words: object) -> str:
    return shlex.join(map(str, words))


def _launch(gpus: int, out: Path) -> str:
    if gpus <= GPUS_PER_NODE:
        return _command("launch/local.sh", out)
    return _command("sbatch", "--nodes", -(-gpus // GPUS_PER_NODE), "launch/slurm.sbatch", out)
