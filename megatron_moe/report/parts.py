"""Build the parts of a report: sections, figures with tables of their numbers, and key facts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_moe.report.history import Array, History
from megatron_moe.report.html import Child, Html, el, number, table
from megatron_moe.report.picture import Line
from megatron_moe.report.thin import Thinned, sample, thin

MAX_TABLE_ROWS = 21


@dataclass(frozen=True, slots=True)
class Section:
    """A section of the page with its heading in the table of contents."""

    id: str
    title: str
    body: Html

    def html(self) -> Html:
        """Return the section as HTML."""
        heading = el("h2", self.title, id=f"{self.id}-title")
        return el("section", heading, self.body, id=self.id, aria_labelledby=f"{self.id}-title")


def figure(title: Child, picture: Html, numbers: Html | None, *, note: Child = None) -> Html:
    """Return a figure with a title, a picture and a table of its numbers."""
    caption = el("figcaption", el("h3", title), el("p", note) if note else None)
    return el("figure", caption, picture, _numbers(title, numbers))


def _numbers(title: Child, numbers: Html | None) -> Html | None:
    if numbers is None:
        return None
    summary = el("summary", "Numbers", el("span", " of ", title, class_="unseen"))
    return el("details", summary, numbers)


def figures(*each: Html | None) -> Html:
    """Return figures side by side, as many as fit on the screen."""
    return el("div", *each, class_="figures")


def facts(each: Sequence[tuple[Child, Child, Child]]) -> Html:
    """Return a list of key facts: name, value and remark of each."""
    return el(
        "dl",
        [
            el("div", el("dt", name), el("dd", el("b", value), el("span", remark)))
            for name, value, remark in each
        ],
        class_="facts",
    )


def thinned_series(history: History, labels: dict[str, str]) -> list[tuple[str, Thinned]]:
    """Return the logged metrics among the keys of ``labels``, thinned, each with its label."""
    all_series = [(label, history.series(name)) for name, label in labels.items()]
    return [(label, thin(series)) for label, series in all_series if series is not None]


def thinning_note(history: History, name: str) -> Html | None:
    """Return a note on how lines are averaged, or None if each point is one logged step."""
    series = history.series(name)
    if series is None or (width := thin(series).width) == 1:
        return None
    return el(
        "p",
        f"Each point of a line is the mean of {width} logged steps. The band around it spans their "
        "minimum and maximum; it is clipped at spikes that would compress the rest.",
        class_="note",
    )


def line_of(name: str, values: Thinned, *, band: bool = True, color: int | None = None) -> Line:
    """Return a thinned series as a line with a band from the minimum to the maximum."""
    wide = band and values.width > 1
    return Line(
        name, values.steps, values.mean,
        low=values.low if wide else None, high=values.high if wide else None, color=color,
    )  # fmt: skip


def steps_table(lines: Sequence[Line], caption: str, *, axis: str = "step") -> Html:
    """Return a table of lines, with rows at evenly spaced points."""
    points = sorted({int(x) for line in lines for x in np.asarray(line.x)})
    rows = [points[i] for i in sample(len(points), MAX_TABLE_ROWS)]
    by_line = [dict(zip(map(int, np.asarray(line.x)), line.y, strict=True)) for line in lines]
    return table(
        [axis, *(el("bdi", line.name) for line in lines)],
        [[f"{x:,}", *(number(values.get(x)) for values in by_line)] for x in rows],
        caption=caption,
    )


def span_of(values: Array) -> str:
    """Describe the range of values in words, for readers who cannot see the picture.

    >>> span_of(np.array([3.0, 1.0, 2.0]))
    'from 3 to 2, lowest 1, highest 3'
    """
    finite = values[np.isfinite(values)]
    if not len(finite):
        return "without a finite value"
    first, last, low, high = (float(v) for v in (finite[0], finite[-1], finite.min(), finite.max()))
    return f"from {number(first)} to {number(last)}, lowest {number(low)}, highest {number(high)}"


def alt_of(what: str, lines: Sequence[Line]) -> str:
    """Describe a line picture in words."""
    if len(lines) == 1:
        return f"{what}: {span_of(lines[0].y)}."
    each = "; ".join(f"{line.name} {span_of(line.y)}" for line in lines[:4])
    more = f"; and {len(lines) - 4} more" if len(lines) > 4 else ""
    return f"{what}: {each}{more}."
