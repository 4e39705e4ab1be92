"""Build the sections about training: losses, learning rate and speed."""

from __future__ import annotations

import numpy as np

from megatron_moe.report.html import Html, command, el, join, missing, number
from megatron_moe.report.parts import (
    Section,
    alt_of,
    figure,
    figures,
    line_of,
    steps_table,
    thinned_series,
    thinning_note,
)
from megatron_moe.report.picture import Line, line_picture
from megatron_moe.report.read import RunFiles

DOMAIN_LOSS = "loss/validation/"


def losses(run: RunFiles) -> Section:
    """Return the section with training and held-out loss, router losses and learning rate."""
    pictures = [
        _loss(run),
        _loss_by_domain(run),
        _one(
            run, "loss/load_balancing", "Load-balancing loss", "without coefficient; 1 is balanced"
        ),
        _one(run, "loss/router_z", "Router z-loss", "without coefficient"),
        _one(run, "grad_norm", "Gradient norm", "before clipping", logarithmic=True),
        _one(run, "learning_rate", "Learning rate", "of each step", from_zero=True),
    ]
    if not any(pictures):
        return Section("loss", "Loss", _no_steps(run))
    note = thinning_note(run.history, "loss/lm")
    body = [_held_out_remark(run), _skipped(run), note, figures(*pictures)]
    return Section("loss", "Loss", join(body))


def speed(run: RunFiles) -> Section:
    """Return the section with throughput, MFU, step time and memory."""
    pictures = [
        _one(
            run, "throughput/tokens_per_second_per_gpu", "Tokens per second and rank",
            "tokens of the global batch / seconds / ranks", from_zero=True,
        ),
        _one(
            run, "throughput/mfu", "MFU",
            "FLOPs with causal attention / the peak in the log", from_zero=True,
        ),
        _one(
            run, "throughput/mfu_full_attention", "MFU with full attention",
            "FLOPs with the whole square / the peak in the log", from_zero=True,
        ),
        _seconds(run),
        _one(run, "memory/peak_gib", "Memory, GiB", "peak over ranks", from_zero=True),
    ]  # fmt: skip
    if not any(pictures):
        return Section("speed", "Speed", _no_steps(run))
    note = thinning_note(run.history, "time/step_seconds")
    return Section("speed", "Speed", join([note, figures(*pictures)]))


def _no_steps(run: RunFiles) -> Html:
    return missing("No step has been logged yet.", command(_train(run)), " logs steps.")


def _train(run: RunFiles) -> str:
    return f"megatron-moe train {run.path}/config.yaml"


def _held_out_remark(run: RunFiles) -> Html | None:
    if run.history.series("loss/validation") is not None:
        return None
    return missing(
        "There is no held-out loss, because the run has no held-out text.",
        "Set ", command("data.validation_path"), " or ", command("data.validation_fraction"),
        " and resume with ", command(_train(run)), ".",
    )  # fmt: skip


def _loss(run: RunFiles) -> Html | None:
    names = {"loss/lm": "training", "loss/validation": "held-out text"}
    series = thinned_series(run.history, names)
    if not series:
        return None
    lines = [line_of(name, values) for name, values in series]
    lines = [
        Line(
            line.name, line.x, line.y, line.low, line.high,
            dots=line.name != "training", color=int(line.name != "training"),
        )
        for line in lines
    ]  # fmt: skip
    dense = ((run.receipt or {}).get("against_dense") or {}).get("loss_dense")
    level = ("source model, held-out text", float(dense)) if dense is not None else None
    picture = line_picture(lines, alt=alt_of("Loss", lines), y="nats per token", level=level)
    return figure(
        "Training and held-out loss", picture, steps_table(lines, "Loss, nats per token"),
        note="Training loss is a mean over a global batch; held-out loss over all held-out text.",
    )  # fmt: skip


def _loss_by_domain(run: RunFiles) -> Html | None:
    names = {name: name.removeprefix(DOMAIN_LOSS) for name in run.history.names(DOMAIN_LOSS)}
    series = thinned_series(run.history, names)
    if not series:
        return None
    series.sort(key=lambda item: -np.nan_to_num(item[1].mean[-1]))
    lines = [
        Line(
            name, values.steps, values.mean,
            dots=len(values.steps) < 30, color=run.domain_colors.get(name),
        )
        for name, values in series
    ]  # fmt: skip
    picture = line_picture(lines, alt=alt_of("Held-out loss by domain", lines), y="nats per token")
    return figure(
        "Held-out loss by domain", picture, steps_table(lines, "Held-out loss, nats per token"),
        note="Sorted by the last value, highest first.",
    )  # fmt: skip


def _one(
    run: RunFiles,
    name: str,
    title: str,
    note: str,
    *,
    logarithmic: bool = False,
    from_zero: bool = False,
) -> Html | None:
    """Return a figure of one metric over steps."""
    series = thinned_series(run.history, {name: title})
    if not series:
        return None
    lines = [line_of(*series[0])]
    picture = line_picture(
        lines, alt=alt_of(title, lines), y=note, logarithmic=logarithmic, from_zero=from_zero
    )
    return figure(title, picture, steps_table(lines, title))


def _seconds(run: RunFiles) -> Html | None:
    names = {"time/step_seconds": "whole step", "time/data_seconds": "waiting for data"}
    series = thinned_series(run.history, names)
    if not series:
        return None
    lines = [line_of(name, values) for name, values in series]
    picture = line_picture(
        lines, alt=alt_of("Seconds per step", lines), y="seconds", from_zero=True
    )
    return figure(
        "Seconds per step", picture, steps_table(lines, "Seconds per step"),
        note="Of the slowest rank.",
    )  # fmt: skip


def _skipped(run: RunFiles) -> Html | None:
    """Return a remark on steps that did not change the weights."""
    steps = [line["step"] for line in run.history.lines if line.get("skipped")]
    if not steps:
        return None
    shown = ", ".join(f"{step:,}" for step in steps[:20]) + (", ..." if len(steps) > 20 else "")
    return el(
        "p",
        f"{number(len(steps))} steps were skipped without changing the weights, because their loss "
        f"or gradient was not finite or was a spike: {shown}.",
    )
