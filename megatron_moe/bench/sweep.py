"""A file of runs to be measured: the command that launches each of them on a cluster."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from megatron_moe.config.load import load
from megatron_moe.config.values import Count, Section


class Row(Section):
    """One run."""

    name: str
    """Name of the record's file."""

    config: Path
    """The configuration, from the root of the repository."""

    overrides: tuple[str, ...] = ()
    """Settings that win over it, key.path=value."""

    routing: Literal["natural", "balanced"] | None = None
    """None: the sweep's."""

    published_mfu: Annotated[float, Field(gt=0)] | None = None
    """Percent, as the source prints it; to compare with, not a measurement of this program."""


class Sweep(Section):
    """Runs of one size."""

    source: str
    """Source of the rows."""

    nodes: Count
    """Number of nodes, with one rank per GPU."""

    out: Path
    """Folder of the records."""

    routing: Literal["natural", "balanced"] = "balanced"
    """Default for rows that do not set it."""

    random: bool = True
    """Random weights and tokens; false takes the dense checkpoint and the text."""

    steps: Count = 20
    """Timed steps."""

    warmup: Count = 5
    """Steps before them."""

    rows: list[Row]
    """The runs."""


def read_sweep(path: Path) -> Sweep:
    """The sweep of a YAML file.

    Raises:
        ConfigError: It is none.
    """
    return load(Sweep, path)


def commands(sweep: Sweep) -> list[str]:
    """Return the command of each row; each writes a record to ``out``.

    The figure that the source measured follows as a comment.
    """
    return [_command(sweep, row) for row in sweep.rows]


def _command(sweep: Sweep, row: Row) -> str:
    arguments = [
        str(row.config),
        *row.overrides,
        *(["--random"] if sweep.random else []),
        f"--routing={row.routing or sweep.routing}",
        f"--steps={sweep.steps}",
        f"--warmup={sweep.warmup}",
        f"--out={sweep.out / row.name}.json",
    ]
    job = f"ACTION=bench sbatch --nodes={sweep.nodes} --job-name={row.name} launch/slurm.sbatch"
    published = (
        f"  # {sweep.source}: {row.published_mfu}% MFU, full attention" if row.published_mfu else ""
    )
    return f"{job} {shlex.join(arguments)}{published}"
