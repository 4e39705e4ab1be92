"""Compare several runs: pictures with one line per run, and the settings that differ."""

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
class _Metric:
    """A metric of which one picture shows all runs."""

    name: str
    title: str
    label: str
    from_zero: bool = False
    band: bool = False


LOSS = (
    _Metric("loss/lm", "Training loss", "nats per token", band=True),
    _Metric("loss/validation", "Held-out loss", "nats per token"),
)
SPEED = (
    _Metric("throughput/tokens_per_second_per_gpu", "Tokens per second and rank", "tokens/s", True),
    _Metric("throughput/mfu", "MFU", "causal attention, relative to the log's peak", True),
    _Metric("throughput/mfu_full_attention", "MFU with full attention", "the whole square", True),
    _Metric("time/step_seconds", "Seconds per step", "seconds", True),
    _Metric("memory/peak_gib", "Memory", "GiB, peak over ranks", True),
)
ROUTER = (
    _Metric("router/load_imbalance", "Busiest expert", "times the mean, mean of layers"),
    _Metric("router/entropy", "Router entropy", "nats, mean of layers"),
    _Metric("router/drop_rate", "Choices dropped", "of all choices", True),
)


def compare_page(runs: Sequence[RunFiles]) -> Html:
    """Return the page of ``megatron-moe compare``."""
    names = names_of([run.path for run in runs])
    lead = f"{len(runs)} runs, plotted over the same steps."
    problems = [
        f"{name}: {line}" for name, run in zip(names, runs, strict=True) for line in run.problems
    ]
    head = join(
        [
            el("h1", "Run comparison"),
            el("p", lead, class_="lead"),
            _summary(names, runs),
            el("div", el("ul", [el("li", line) for line in problems]), class_="wrong")
            if problems
            else None,
        ]
    )
    domains = {name: None for run in runs for name in run.history.names(DOMAIN_LOSS)}
    by_domain = [
        _Metric(name, f"Held-out loss, {name.removeprefix(DOMAIN_LOSS)}", "nats per token")
        for name in domains
    ]
    sections = [
        Section("differences", "Differences", _differences(names, runs)),
        _section("loss", "Loss", names, runs, [*LOSS, *by_domain]),
        _section("speed", "Speed", names, runs, SPEED),
        _section("router", "Router", names, runs, ROUTER),
    ]
    return page(f"{' / '.join(names)} - megatron_moe", head, sections)


def names_of(paths: Sequence[Path]) -> list[str]:
    """Return distinct names of runs: folder names, or the parts of their paths that differ.

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
        "run", "step", "tokens seen", "training loss", "held-out loss", "tokens/s and rank",
        "MFU, causal", "busiest expert",
    ]  # fmt: skip
    rows: list[list[Child]] = [
        [
            el("bdi", name),
            f"{run.history.last_step:,} of {run.config.train.steps:,}",
            _value(run, "tokens/seen", -1),
            _value(run, "loss/lm", -1),
            _value(run, "loss/validation", -1),
            _value(run, "throughput/tokens_per_second_per_gpu"),
            _value(run, "throughput/mfu"),
            _value(run, "router/load_imbalance", -1),
        ]
        for name, run in zip(names, runs, strict=True)
    ]
    caption = "Losses and loads are from the last step; speeds are medians"
    return table(head, rows, caption=caption)


def _value(run: RunFiles, metric: str, index: int | None = None) -> str:
    series = run.history.series(metric)
    if series is None:
        return number(None)
    return number(float(np.nanmedian(series.values) if index is None else series.values[index]))


def _section(
    id_: str, title: str, names: list[str], runs: Sequence[RunFiles], metrics: Sequence[_Metric]
) -> Section:
    pictures = [_overlay(names, runs, metric) for metric in metrics]
    if not any(pictures):
        return Section(id_, title, missing("None of the runs has logged a step yet."))
    return Section(id_, title, figures(*pictures))


def _overlay(names: list[str], runs: Sequence[RunFiles], metric: _Metric) -> Html | None:
    """Draw one metric of all runs; a run has the same color in every picture."""
    lines = []
    for index, (name, run) in enumerate(zip(names, runs, strict=True)):
        series = run.history.series(metric.name)
        if series is not None:
            line = line_of(name, thin(series), band=metric.band)
            few = len(series) < 30
            lines.append(Line(name, line.x, line.y, line.low, line.high, few, index))
    if not lines:
        return None
    picture = line_picture(
        lines, alt=alt_of(metric.title, lines), y=metric.label, from_zero=metric.from_zero
    )
    numbers = steps_table(lines, f"{metric.title}, {metric.label}")
    note = None
    if len(lines) == 1:
        note = el("span", "Logged only by ", el("bdi", lines[0].name), ".")
    return figure(metric.title, picture, numbers, note=note)


def _differences(names: list[str], runs: Sequence[RunFiles]) -> Html:
    different = differences([run.config for run in runs])
    if not different:
        return el("p", "The configurations are equal.")
    rows = [[setting, *values] for setting, values in different.items()]
    head: list[Child] = ["setting", *(el("bdi", name) for name in names)]
    return table(head, rows, caption="Settings that differ between runs")


def differences(configs: Sequence[Any]) -> dict[str, list[str]]:
    """Return the values of each setting that differs between configurations."""
    trees = [{name: shown(v) for name, v, _, _ in settings_of(config)} for config in configs]
    names = dict.fromkeys(name for tree in trees for name in tree)
    rows = {name: [tree.get(name, "") for tree in trees] for name in names}
    return {name: values for name, values in rows.items() if len(set(values)) > 1}
