"""Several runs over each other: the same pictures, one line a run, and what was set differently."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonpath
from pathlib import Path
from typing import Any

import numpy as np

from megatron_moe.report.html import Child, Html, el, join, missing, number, table
from megatron_moe.report.origin import settings_of, shown
from megatron_moe.report.page import page
from megatron_moe.report.parts import (
    Section,
    alt_of,
    figure,
    figures,
    line_of,
    steps_table,
)
from megatron_moe.report.picture import Line, line_picture
from megatron_moe.report.read import RunFiles
from megatron_moe.report.thin import thin
from megatron_moe.report.training import DOMAIN_LOSS


@dataclass(frozen=True, slots=True)
class _Shown:
    """One value of every run in one picture."""

    metric: str
    title: str
    label: str
    from_zero: bool = False
    band: bool = False


LOSS = (
    _Shown("loss/lm", "Training loss", "nats per token", band=True),
    _Shown("loss/validation", "Held-out loss", "nats per token"),
)
SPEED = (
    _Shown("throughput/tokens_per_second_per_gpu", "Tokens per second and rank", "tokens/s", True),
    _Shown("throughput/mfu", "MFU", "of the peak the log names", True),
    _Shown("time/step_seconds", "Seconds of a step", "seconds", True),
    _Shown("memory/peak_gib", "Memory", "GiB, most that a rank has held", True),
)
ROUTER = (
    _Shown("router/load_imbalance", "Busiest expert", "times the mean, mean of layers"),
    _Shown("router/entropy", "Router entropy", "nats, mean of layers"),
    _Shown("router/drop_rate", "Choices dropped", "of all choices", True),
)


def compare_page(runs: Sequence[RunFiles]) -> Html:
    """The page of ``megatron-moe compare``."""
    names = names_of([run.path for run in runs])
    lead = f"{len(runs)} runs over each other, step by step."
    wrong = [f"{name}: {line}" for name, run in zip(names, runs, strict=True) for line in run.wrong]
    head = join(
        [
            el("h1", "Runs compared"),
            el("p", lead, class_="lead"),
            _summary(names, runs),
            el("div", el("ul", [el("li", line) for line in wrong]), class_="wrong")
            if wrong
            else None,
        ]
    )
    domains = {name: None for run in runs for name in run.history.names(DOMAIN_LOSS)}
    by_domain = [
        _Shown(name, f"Held-out loss, {name.removeprefix(DOMAIN_LOSS)}", "nats per token")
        for name in domains
    ]
    sections = [
        Section("differences", "What differs", _differences(names, runs)),
        _section("loss", "Loss", names, runs, [*LOSS, *by_domain]),
        _section("speed", "Speed", names, runs, SPEED),
        _section("router", "Router", names, runs, ROUTER),
    ]
    return page(f"{' / '.join(names)} - megatron_moe", head, sections)


def names_of(paths: Sequence[Path]) -> list[str]:
    """Names of runs that tell them apart: folder names, or what differs of their paths.

    >>> names_of([Path("runs/a"), Path("runs/b")]), names_of([Path("x/a/run"), Path("x/b/run")])
    (['a', 'b'], ['a/run', 'b/run'])
    """
    full = [path.resolve() for path in paths]
    if len({path.name for path in full}) == len(full):
        return [path.name for path in full]
    common = commonpath(full)
    return [str(path.relative_to(common)) for path in full]


def _summary(names: list[str], runs: Sequence[RunFiles]) -> Html:
    head = [
        "run", "step", "tokens seen", "training loss", "held-out loss", "tokens/s and rank", "MFU",
        "busiest expert",
    ]  # fmt: skip
    rows: list[list[Child]] = [
        [
            el("bdi", name),
            f"{run.history.last_step:,} of {run.config.train.steps:,}",
            _of(run, "tokens/seen", -1),
            _of(run, "loss/lm", -1),
            _of(run, "loss/validation", -1),
            _of(run, "throughput/tokens_per_second_per_gpu"),
            _of(run, "throughput/mfu"),
            _of(run, "router/load_imbalance", -1),
        ]
        for name, run in zip(names, runs, strict=True)
    ]
    return table(head, rows, caption="Losses and loads of the last step; speed is the median")


def _of(run: RunFiles, metric: str, place: int | None = None) -> str:
    series = run.history.series(metric)
    if series is None:
        return number(None)
    return number(float(np.nanmedian(series.values) if place is None else series.values[place]))


def _section(
    id_: str, title: str, names: list[str], runs: Sequence[RunFiles], shown: Sequence[_Shown]
) -> Section:
    pictures = [_overlay(names, runs, one) for one in shown]
    if not any(pictures):
        return Section(id_, title, missing("None of the runs has logged a step yet."))
    return Section(id_, title, figures(*pictures))


def _overlay(names: list[str], runs: Sequence[RunFiles], shown: _Shown) -> Html | None:
    """A run keeps its colour in every picture, whoever else is in it."""
    lines = []
    for place, (name, run) in enumerate(zip(names, runs, strict=True)):
        series = run.history.series(shown.metric)
        if series is not None:
            line = line_of(name, thin(series), band=shown.band)
            few = len(series) < 30
            lines.append(Line(name, line.x, line.y, line.low, line.high, few, place))
    if not lines:
        return None
    picture = line_picture(
        lines, alt=alt_of(shown.title, lines), y=shown.label, from_zero=shown.from_zero
    )
    numbers = steps_table(lines, f"{shown.title}, {shown.label}")
    alone = el("span", "Only ", el("bdi", lines[0].name), " has it.") if len(lines) == 1 else None
    return figure(shown.title, picture, numbers, note=alone)


def _differences(names: list[str], runs: Sequence[RunFiles]) -> Html:
    different = differences([run.config for run in runs])
    if not different:
        return el("p", "The configurations are equal.")
    rows = [[setting, *values] for setting, values in different.items()]
    head: list[Child] = ["setting", *(el("bdi", name) for name in names)]
    return table(head, rows, caption="Settings that are not the same in all runs")


def differences(configs: Sequence[Any]) -> dict[str, list[str]]:
    """Values of each setting that is not the same in all configurations."""
    every = [{name: shown(v) for name, v, _, _ in settings_of(config)} for config in configs]
    settings = dict.fromkeys(name for one in every for name in one)
    values = {name: [one.get(name, "") for one in every] for name in settings}
    return {name: found for name, found in values.items() if len(set(found)) > 1}
