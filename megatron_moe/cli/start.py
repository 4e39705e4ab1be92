"""On which ranks a story runs: those of a launched job, or ranks that are started here."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Literal

from megatron_moe.config.run import RunConfig
from megatron_moe.errors import ConfigError
from megatron_moe.hf.spec import read_spec
from megatron_moe.rules.check import check

if TYPE_CHECKING:  # imports torch, which --help does not wait for
    from megatron_moe.runtime.engine import Engine
    from megatron_moe.runtime.world import RankPosition, World


def on_ranks(
    story: Callable[[RunConfig, World], None], config: RunConfig, ranks: int | None
) -> None:
    """Run a story on every rank, once its configuration is known to be legal.

    Args:
        story: What each rank does.
        config: The run.
        ranks: Ranks to start on this machine; None outside of a launcher means one.

    Raises:
        ConfigError: Ranks are asked for where a launcher has started them, a rule is violated, or
            the device or engine that the run asks for is not available.
    """
    from megatron_moe.runtime.engine import engine_before_forking, engine_here
    from megatron_moe.runtime.world import resolve_device

    position = position_of(ranks)
    device = resolve_device(config.run.device, ranks=ranks or 1)
    choose = engine_here if position is not None else engine_before_forking
    engine = choose(config.run.engine, device)
    world_size = position.size if position is not None else ranks or 1
    check(resolved(config, engine), read_spec(config.dense.path), world_size)
    config.run.dir.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    joined_to(position, partial(story, config), ranks=ranks or 1, device=device)


def resolved(config: RunConfig, engine: Engine) -> RunConfig:
    """Return the configuration with ``auto`` replaced by what this machine has, for the rules."""
    chosen = {"device": engine.device, "engine": engine.name}
    return config.model_copy(update={"run": config.run.model_copy(update=chosen)})


def position_of(ranks: int | None) -> RankPosition | None:
    """Where torchrun or SLURM put this process; None where it is to start ranks itself.

    Raises:
        ConfigError: There is a launcher, and ``ranks`` asks for more of them.
    """
    from megatron_moe.runtime.world import position_from_environment

    position = position_from_environment()
    if position is not None and ranks is not None:
        raise ConfigError(
            f"--ranks ({ranks}) is for starting ranks on this machine, but torchrun or SLURM has "
            f"started {position.size} already: leave --ranks away"
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
        if kind == "cpu":  # on CUDA an import might touch the GPU, which forked ranks could not
            _import_stories()
        run_local_ranks(story, ranks=ranks, device=kind)
    else:
        with joined(position, kind) as world:
            story(world)


def _import_stories() -> None:
    """Import what ranks will need once, before they are forked, and not once on each."""
    from megatron_moe.runtime import cpu

    cpu.install()
    import megatron_moe.commands.train  # noqa: F401
