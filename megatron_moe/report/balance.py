"""Build the section about expert loads: by layer and step, by expert, and dropped choices.

Shape letters of this module:

    S  steps   C  columns of a picture   L  MoE layers   E  experts
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_moe.report.history import Array, Series
from megatron_moe.report.html import Html, command, el, join, missing, number, table
from megatron_moe.report.parts import (
    Section,
    alt_of,
    figure,
    figures,
    line_of,
    span_of,
    steps_table,
    thinned_series,
    thinning_note,
)
from megatron_moe.report.picture import Rows, Scale, heat_picture, line_picture
from megatron_moe.report.read import RunFiles
from megatron_moe.report.thin import thin

LOADS, REVIVED = "router/load_by_expert", "router/revived"
MOST_REVIVALS = 50
"""Number of rows in the table of re-created experts."""


def balance(run: RunFiles) -> Section:
    """Return the section about the load balance of the experts."""
    by_layer = [
        _by_layer(run, "router/load_imbalance_by_layer", "Busiest expert by layer and step",
                  "tokens of the busiest expert / mean; 1 is balanced", worst=True),
        _by_layer(run, "router/entropy_by_layer", "Router entropy by layer and step",
                  f"nats; ln {run.config.moe.num_moe_experts} = "
                  f"{number(float(np.log(run.config.moe.num_moe_experts)))} is uniform"),
        _drops(run),
    ]  # fmt: skip
    if not any(by_layer):
        what = "No expert loads have been logged yet."
        body = missing(what, command(f"megatron-moe train {run.path}/config.yaml"), " logs them.")
        return Section("balance", "Expert load balance", body)
    series = run.history.series(LOADS)
    pictures = [_mean(run), *by_layer, *([] if series is None else _experts(run, series))]
    remarks = [
        _revived(run),
        _no_drops(run),
        _no_loads() if series is None else None,
        thinning_note(run.history, "router/load_imbalance"),
    ]
    return Section("balance", "Expert load balance", join([*remarks, figures(*pictures)]))


def _mean(run: RunFiles) -> Html | None:
    title = "Busiest expert, mean of layers"
    series = thinned_series(run.history, {"router/load_imbalance": "busiest / mean"})
    if not series:
        return None
    lines = [line_of(*series[0])]
    picture = line_picture(lines, alt=alt_of(title, lines), y="busiest expert / mean")
    return figure(title, picture, steps_table(lines, title))


def _by_layer(
    run: RunFiles, name: str, title: str, label: str, *, worst: bool = False
) -> Html | None:
    """Return a heat map of a metric over layers and steps."""
    series = run.history.series(name)
    if series is None:
        return None
    thinned = thin(series)
    values_CL = thinned.high if worst else thinned.mean
    layers = run.layer_names(values_CL.shape[1])
    picture = heat_picture(
        values_CL.T,
        rows=Rows("layer", layers),
        columns=Rows.of_steps(thinned.steps),
        scale=Scale.of(values_CL, label),
        alt=f"{title}: {span_of(values_CL.mean(axis=0))}, from the first layer to the last.",
    )
    reduction = "maximum" if worst else "mean"
    note = ""
    if thinned.width > 1:
        note = f"Each column is the {reduction} of {thinned.width} logged steps."
    return figure(title, picture, _layers_table(series, layers, title), note=note)


def _layers_table(series: Series, layers: list[str], title: str) -> Html:
    """Return a table by layer: values at the first and the last step, mean and maximum."""
    values_SL = series.values
    rows = [
        [layers[i], *map(number, (v_S[0], v_S[-1], np.nanmean(v_S), np.nanmax(v_S)))]
        for i, v_S in enumerate(values_SL.T)
    ]
    first, last = f"step {series.steps[0]:,}", f"step {series.steps[-1]:,}"
    return table(["layer", first, last, "mean", "highest"], rows, caption=title)


def _drops(run: RunFiles) -> Html | None:
    """Return a picture of drop rates if any choice was dropped; otherwise see `_no_drops`."""
    series = run.history.series("router/drop_rate_by_layer")
    if series is None or not np.nanmax(series.values) > 0:
        return None
    return _by_layer(
        run, "router/drop_rate_by_layer", "Drop rate by layer and step",
        "choices dropped by capacity / all choices",
    )  # fmt: skip


def _no_drops(run: RunFiles) -> Html | None:
    series = run.history.series("router/drop_rate")
    if series is None or np.nanmax(series.values) > 0:
        return None
    factor = run.config.moe.moe_expert_capacity_factor
    reason = (
        "moe.moe_expert_capacity_factor is null" if factor is None else f"capacity factor {factor}"
    )
    return el("p", f"No expert choice was dropped in any step ({reason}).")


def _revived(run: RunFiles) -> Html | None:
    """Return a table of the experts that were re-created from siblings, the newest first."""
    rows = [
        [f"{step:,}", *(f"{number:.0f}" for number in numbers)]
        for step, revived in reversed(run.history.tables(REVIVED))
        for numbers in revived
    ]
    if not rows:
        return None
    title = f"Dead experts that were re-created: {len(rows):,}"
    if len(rows) > MOST_REVIVALS:
        title += f", of which the newest {MOST_REVIVALS}"
    head = ["after step", "layer", "expert", "copied from expert"]
    return table(head, rows[:MOST_REVIVALS], caption=title)


def _no_loads() -> Html:
    return missing(
        "metrics.jsonl has no loads by expert, because an older version wrote it.",
        "Future steps will log them.",
    )


def _experts(run: RunFiles, series: Series) -> list[Html]:
    """Return pictures of each expert's load: by layer at the last step, and over time."""
    return [_experts_now(run, series), *_experts_over_time(run, series)]


def _experts_now(run: RunFiles, series: Series) -> Html:
    loads_LE = series.values[-1]
    layers = run.layer_names(len(loads_LE))
    title = f"Load of each expert at step {series.steps[-1]:,}"
    picture = heat_picture(
        loads_LE,
        rows=Rows("layer", layers),
        columns=_expert_axis(loads_LE.shape[1]),
        scale=Scale.around_one(loads_LE, "tokens of the expert / mean; 1 is balanced"),
        alt=f"{title}: the busiest has {number(float(loads_LE.max()))} times the mean, the least "
        f"busy {number(float(loads_LE.min()))} times.",
    )
    rows = [
        [
            layers[i],
            f"{int(load_E.argmax())}", number(float(load_E.max())),
            f"{int(load_E.argmin())}", number(float(load_E.min())),
            f"{int((load_E == 0).sum())}",
        ]
        for i, load_E in enumerate(loads_LE)
    ]  # fmt: skip
    head = [
        "layer", "busiest expert", "load / mean", "least busy expert", "load / mean", "idle",
    ]  # fmt: skip
    return figure(title, picture, table(head, rows, caption=title))


def _experts_over_time(run: RunFiles, series: Series) -> list[Html]:
    """Return pictures of the first, the middle and the last MoE layer."""
    count = series.values.shape[1]
    layers = run.layer_names(count)
    return [
        _one_layer(series.steps, series.values[:, i], layers[i])
        for i in sorted({0, count // 2, count - 1})
    ]


def _one_layer(steps: NDArray[np.int64], loads_SE: Array, layer: str) -> Html:
    title = f"Load of each expert over time, layer {layer}"
    picture = heat_picture(
        loads_SE.T,
        rows=_expert_axis(loads_SE.shape[1]),
        columns=Rows.of_steps(steps),
        scale=Scale.around_one(loads_SE, "tokens of the expert / mean; 1 is balanced"),
        alt=f"{title}: the busiest {span_of(loads_SE.max(axis=1))} times the mean.",
    )
    rows = [
        [f"{e}", *map(number, (load_S[0], load_S[-1], load_S.mean(), load_S.max()))]
        for e, load_S in enumerate(loads_SE.T)
    ]
    head = ["expert", f"step {steps[0]:,}", f"step {steps[-1]:,}", "mean", "highest"]
    return figure(title, picture, table(head, rows, caption=title))


def _expert_axis(count: int) -> Rows:
    return Rows("expert", [str(expert) for expert in range(count)])
