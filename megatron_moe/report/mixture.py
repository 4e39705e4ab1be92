"""Build the section about the mixture of domains."""

from __future__ import annotations

from megatron_moe.report.html import Html, command, el, missing, number, table
from megatron_moe.report.parts import Section, alt_of, figure, figures, steps_table, thinned_series
from megatron_moe.report.picture import Line, line_picture
from megatron_moe.report.read import RunFiles

WEIGHT, SHARE, EPOCHS = "mixing/weight/", "mixing/share/", "mixing/epochs/"


def mixture(run: RunFiles) -> Section:
    """Return the section with domain weights and shares over steps, and epochs of each domain."""
    pictures = [
        _domains(run, WEIGHT, "Weights", "share of future samples"),
        _domains(run, SHARE, "Shares so far", "share of the samples so far"),
    ]
    if not any(pictures):
        how = " and ", command("data.mixing"), " train on several, with fixed or adaptive weights."
        body = missing("The run trains on a single text.", command("data.domains"), *how)
    else:
        body = figures(*pictures, _epochs(run))
    return Section("mixture", "Mixture of domains", body)


def _domains(run: RunFiles, prefix: str, title: str, label: str) -> Html | None:
    names = {name: name.removeprefix(prefix) for name in run.history.names(prefix)}
    lines = [
        Line(name, values.steps, values.mean, color=run.domain_colors.get(name))
        for name, values in thinned_series(run.history, names)
    ]
    if not lines:
        return None
    picture = line_picture(lines, alt=alt_of(title, lines), y=label, from_zero=True)
    return figure(f"{title} of the domains", picture, steps_table(lines, title))


def _epochs(run: RunFiles) -> Html | None:
    """Return a table of how often each domain's text has been read."""
    last = {
        name.removeprefix(EPOCHS): series.values[-1]
        for name in run.history.names(EPOCHS)
        if (series := run.history.series(name)) is not None
    }
    if not last:
        return None
    most = max([*last.values(), run.config.data.warn_above_epochs])
    rows = [
        [el("bdi", name), number(float(epochs)), _bar(float(epochs) / most)]
        for name, epochs in last.items()
    ]
    heading = el("figcaption", el("h3", "Epochs"), el("p", "How often each text has been read."))
    head = ["domain", "epochs", el("span", "relative to the largest", class_="unseen")]
    return el("figure", heading, table(head, rows, caption="Epochs of each domain"))


def _bar(part: float) -> Html:
    return el("i", class_="bar", style=f"width:{100 * part:.1f}%", aria_hidden="true")
