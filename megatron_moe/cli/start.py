"""Run a story on the ranks of a launched job, or on ranks that are started here."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

from megatron_moe.cli.same_settings import check_same_settings
from megatron_moe.config.run import RunConfig
from megatron_moe.errors import ConfigError, JobError
from megatron_moe.hf.disk import disk_errors_in_words, make_folder
from megatron_moe.hf.spec import read_spec
from megatron_moe.rules.check import check, nearest_legal
from megatron_moe.rules.nearest import changes

if TYPE_CHECKING:  # imports torch, which --help does not wait for
    from megatron_moe.runtime.engine import Engine
    from megatron_moe.runtime.launchers import RankPosition
    from megatron_moe.runtime.world import World


def on_ranks(
    story: Callable[[RunConfig, World], None], config: RunConfig, ranks: int | None
) -> None:
    """Check a configuration, then run a story on every rank.

    Args:
        story: What each rank does.
        config: The run.
        ranks: Ranks to start on this machine; None outside of a launcher means one.

    Raises:
        ConfigError: Ranks are requested although a launcher has started some, a rule is violated,
            or the requested device or engine is not available.
    """
    from megatron_moe.runtime.engine import engine_before_forking, engine_here
    from megatron_moe.runtime.world import resolve_device

    position = position_of(ranks)
    device = resolve_device(config.run.device, ranks=ranks or 1)
    choose = engine_here if position is not None else engine_before_forking
    engine = choose(config.run.engine, device)
    world_size = position.size if position is not None else ranks or 1
    if config.parallel.adapt_to_ranks:
        config = _adapted(config, world_size, position)
    check(resolved(config, engine), read_spec(config.source.path), world_size)
    make_folder(config.run.dir, "run.dir")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if position is not None:  # each machine has read settings of its own
        story = partial(_with_same_settings, story)
    story_of_rank = partial(_in_run_dir, story, config)
    joined_to(position, story_of_rank, ranks=ranks or 1, device=device)


def _in_run_dir(story: Callable[[RunConfig, World], None], config: RunConfig, world: World) -> None:
    with disk_errors_in_words(config.run.dir):
        story(config, world)


def _with_same_settings(
    story: Callable[[RunConfig, World], None], config: RunConfig, world: World
) -> None:
    check_same_settings(config, world)
    story(config, world)


@contextlib.contextmanager
def resumable(way_out: str) -> Iterator[None]:
    """Append how to resume to the error of a job that lost a rank inside a ``with`` block."""
    try:
        yield
    except JobError as error:
        raise JobError(f"{error}\n  {way_out}") from error


def on_ranks_at_hand(
    story: Callable[[RunConfig, World], None],
    config: RunConfig,
    ranks: int | None,
    *,
    overrides: Sequence[str],
) -> None:
    """Run a story that reads a model, under a layout that the ranks at hand allow.

    The configured layout is the one a model was or will be trained with, which may need more ranks.
    The nearest legal one takes its place, and standard error names it. A layout that the user has
    named in ``overrides`` is kept, or refused.
    """
    position = position_of(ranks)
    world_size = position.size if position is not None else ranks or 1
    if not any(word.startswith("parallel.") for word in overrides):
        config = _adapted(config, world_size, position)
    on_ranks(story, config, ranks)


def _adapted(config: RunConfig, world_size: int, position: RankPosition | None) -> RunConfig:
    """Return the configuration with the nearest legal layout, if there is one; rank 0 prints it."""
    parallel = nearest_legal(config, read_spec(config.source.path), world_size)
    if parallel is None or parallel == config.parallel:
        return config
    if position is None or position.rank == 0:
        change = changes(config.parallel, parallel)
        print(f"Layout for {world_size} rank(s): {change}", file=sys.stderr)
    return config.model_copy(update={"parallel": parallel})


def resolved(config: RunConfig, engine: Engine) -> RunConfig:
    """Return the configuration with ``auto`` replaced by what this machine has, for the rules."""
    chosen = {"device": engine.device, "engine": engine.name}
    return config.model_copy(update={"run": config.run.model_copy(update=chosen)})


def position_of(ranks: int | None) -> RankPosition | None:
    """Return the rank that torchrun or SLURM gave this process, or None without a launcher.

    Raises:
        ConfigError: A launcher has started ranks, and ``ranks`` asks for more.
    """
    from megatron_moe.runtime.launchers import position_from_environment

    position = position_from_environment()
    if position is not None and ranks is not None:
        raise ConfigError(
            f"--ranks ({ranks}) starts ranks on this machine, but torchrun or SLURM has already "
            f"started {position.size}.\n  remove --ranks"
        )
    return position


def joined_to(
    position: RankPosition | None,
    story: Callable[[World], None],
    *,
    ranks: int,
    device: Literal["auto", "cpu", "cuda"],
) -> None:
    """Run a story at ``position`` of a launched job, or on ``ranks`` ranks started here."""
    from megatron_moe.runtime.world import joined, resolve_device, run_local_ranks

    kind = resolve_device(device, ranks=ranks if position is None else 1)
    if position is None:
        if kind == "cpu":  # on CUDA an import might use the GPU, which breaks it in forked ranks
            _import_stories()
        run_local_ranks(story, ranks=ranks, device=kind)
    else:
        with joined(position, kind) as world:
            story(world)


def _import_stories() -> None:
    """Import the modules that ranks need once, before forking, instead of once per rank."""
    from megatron_moe.runtime import cpu

    cpu.install()
    import megatron_moe.commands.train  # noqa: F401
