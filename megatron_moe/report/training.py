"""Sections about the training itself: losses, learning rate, speed."""

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
    thinning_note,
    told,
)
from megatron_moe.report.picture import Line, line_picture
from megatron_moe.report.read import RunFiles

DOMAIN_LOSS = "loss/validation/"


def losses(run: RunFiles) -> Section:
    """Training and held-out loss, and what keeps the router in balance."""
    pictures = [
        _loss(run),
        _loss_by_domain(run),
        _one(
            run, "loss/load_balancing", "Load-balancing loss", "before its coefficient; 1 is even"
        ),
        _one(run, "loss/router_z", "Router z-loss", "before its coefficient"),
        _one(run, "grad_norm", "Gradient norm", "before clipping", logarithmic=True),
        _one(run, "learning_rate", "Learning rate", "of each step", from_zero=True),
    ]
    if not any(pictures):
        return Section("loss", "Loss", _no_steps(run))
    note = thinning_note(run.history, "loss/lm")
    body = [_held_out_remark(run), _skipped(run), note, figures(*pictures)]
    return Section("loss", "Loss", join(body))


def speed(run: RunFiles) -> Section:
    """Throughput, MFU, and where a step's time and memory go."""
    pictures = [
        _one(
            run, "throughput/tokens_per_second_per_gpu", "Tokens per second and rank",
            "tokens of the global batch / seconds / ranks", from_zero=True,
        ),
        _one(
            run, "throughput/mfu", "MFU",
            "model FLOPs / the peak that the log names at start", from_zero=True,
        ),
        _seconds(run),
        _one(run, "memory/peak_gib", "Memory, GiB", "most that a rank has held", from_zero=True),
    ]  # fmt: skip
    if not any(pictures):
        return Section("speed", "Speed", _no_steps(run))
    note = thinning_note(run.history, "time/step_seconds")
    return Section("speed", "Speed", join([note, figures(*pictures)]))


def _no_steps(run: RunFiles) -> Html:
    return missing("No step has been logged yet.", "Steps come with ", command(_train(run)), ".")


def _train(run: RunFiles) -> str:
    return f"megatron-moe train {run.path}/config.yaml"


def _held_out_remark(run: RunFiles) -> Html | None:
    if run.history.series("loss/validation") is not None:
        return None
    return missing(
        "No held-out loss: the run has no held-out text.",
        "Set ", command("data.validation_path"), " or ", command("data.validation_fraction"),
        " and go on with ", command(_train(run)), ".",
    )  # fmt: skip


def _loss(run: RunFiles) -> Html | None:
    names = {"loss/lm": "training", "loss/validation": "held-out text"}
    found = told(run.history, names)
    if not found:
        return None
    lines = [line_of(name, values) for name, values in found]
    lines = [
        Line(
            line.name, line.x, line.y, line.low, line.high,
            dots=line.name != "training", colour=int(line.name != "training"),
        )
        for line in lines
    ]  # fmt: skip
    dense = ((run.receipt or {}).get("against_dense") or {}).get("loss_dense")
    level = ("dense model, held-out text", float(dense)) if dense is not None else None
    picture = line_picture(lines, alt=alt_of("Loss", lines), y="nats per token", level=level)
    return figure(
        "Training and held-out loss", picture, steps_table(lines, "Loss, nats per token"),
        note="Mean over the tokens of a global batch, and over all held-out text.",
    )  # fmt: skip


def _loss_by_domain(run: RunFiles) -> Html | None:
    names = {name: name.removeprefix(DOMAIN_LOSS) for name in run.history.names(DOMAIN_LOSS)}
    found = told(run.history, names)
    if not found:
        return None
    found.sort(key=lambda item: -np.nan_to_num(item[1].mean[-1]))
    lines = [
        Line(
            name, values.steps, values.mean,
            dots=len(values.steps) < 30, colour=run.domain_colours.get(name),
        )
        for name, values in found
    ]  # fmt: skip
    picture = line_picture(lines, alt=alt_of("Held-out loss by domain", lines), y="nats per token")
    return figure(
        "Held-out loss by domain", picture, steps_table(lines, "Held-out loss, nats per token"),
        note="Highest last value first.",
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
    """One value of every step."""
    found = told(run.history, {name: title})
    if not found:
        return None
    lines = [line_of(*found[0])]
    picture = line_picture(
        lines, alt=alt_of(title, lines), y=note, logarithmic=logarithmic, from_zero=from_zero
    )
    return figure(title, picture, steps_table(lines, title))


def _seconds(run: RunFiles) -> Html | None:
    names = {"time/step_seconds": "whole step", "time/data_seconds": "waiting for data"}
    found = told(run.history, names)
    if not found:
        return None
    lines = [line_of(name, values) for name, values in found]
    picture = line_picture(
        lines, alt=alt_of("Seconds of a step", lines), y="seconds", from_zero=True
    )
    return figure(
        "Seconds of a step", picture, steps_table(lines, "Seconds of a step"),
        note="The slowest rank's.",
    )  # fmt: skip


def _skipped(run: RunFiles) -> Html | None:
    """Steps that changed no weights."""
    steps = [line["step"] for line in run.history.lines if line.get("skipped")]
    if not steps:
        return None
    shown = ", ".join(f"{step:,}" for step in steps[:20]) + (", ..." if len(steps) > 20 else "")
    return el(
        "p",
        f"{number(len(steps))} steps changed no weights, because their loss or gradient was not "
        f"finite or was a spike: {shown}.",
    )
