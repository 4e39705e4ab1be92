"""What a report is put together from: sections, figures with their numbers, facts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_moe.report.history import Array, History
from megatron_moe.report.html import Child, Html, el, number, table
from megatron_moe.report.picture import Line
from megatron_moe.report.thin import Thinned, sample, thin

TABLE_ROWS = 21


@dataclass(frozen=True, slots=True)
class Section:
    """A heading of the table of contents and what stands below it."""

    id: str
    title: str
    body: Html

    def html(self) -> Html:
        """The section."""
        heading = el("h2", self.title, id=f"{self.id}-title")
        return el("section", heading, self.body, id=self.id, aria_labelledby=f"{self.id}-title")


def figure(title: Child, picture: Html, numbers: Html | None, *, note: Child = None) -> Html:
    """A picture under its title, and its numbers as a table."""
    told = el("figcaption", el("h3", title), el("p", note) if note else None)
    return el("figure", told, picture, _numbers(title, numbers))


def _numbers(title: Child, numbers: Html | None) -> Html | None:
    if numbers is None:
        return None
    summary = el("summary", "Numbers", el("span", " of ", title, class_="unseen"))
    return el("details", summary, numbers)


def figures(*each: Html | None) -> Html:
    """Figures side by side, as many as the screen holds."""
    return el("div", *each, class_="figures")


def facts(each: Sequence[tuple[Child, Child, Child]]) -> Html:
    """The few numbers that matter: a name, a value, a remark."""
    return el(
        "dl",
        [
            el("div", el("dt", name), el("dd", el("b", value), el("span", remark)))
            for name, value, remark in each
        ],
        class_="facts",
    )


def told(history: History, names: dict[str, str]) -> list[tuple[str, Thinned]]:
    """The values that a run has told, thinned, by what they are called on the page."""
    found = [(shown, history.series(name)) for name, shown in names.items()]
    return [(shown, thin(series)) for shown, series in found if series is not None]


def thinning_note(history: History, name: str) -> Html | None:
    """What a line of the section stands for, where a point is more than a step."""
    series = history.series(name)
    if series is None or (width := thin(series).width) == 1:
        return None
    return el(
        "p",
        f"A point of a line is the mean of {width} logged steps. The band around it reaches from "
        "the lowest to the highest of them, and is cut where a spike would squeeze the rest.",
        class_="note",
    )


def line_of(name: str, values: Thinned, *, band: bool = True, colour: int | None = None) -> Line:
    """A thinned series as a line, within the lowest and the highest of what it stands for."""
    wide = band and values.width > 1
    return Line(
        name, values.steps, values.mean,
        low=values.low if wide else None, high=values.high if wide else None, colour=colour,
    )  # fmt: skip


def steps_table(lines: Sequence[Line], caption: str, *, axis: str = "step") -> Html:
    """Lines as a table, one row for each of some evenly spaced points."""
    every = sorted({int(x) for line in lines for x in np.asarray(line.x)})
    rows = [every[i] for i in sample(len(every), TABLE_ROWS)]
    by_line = [dict(zip(map(int, np.asarray(line.x)), line.y, strict=True)) for line in lines]
    return table(
        [axis, *(el("bdi", line.name) for line in lines)],
        [[f"{x:,}", *(number(values.get(x)) for values in by_line)] for x in rows],
        caption=caption,
    )


def span_of(values: Array) -> str:
    """From where to where, in words, for readers without the picture.

    >>> span_of(np.array([3.0, 1.0, 2.0]))
    'from 3 to 2, lowest 1, highest 3'
    """
    finite = values[np.isfinite(values)]
    if not len(finite):
        return "without a finite value"
    first, last, low, high = (float(v) for v in (finite[0], finite[-1], finite.min(), finite.max()))
    return f"from {number(first)} to {number(last)}, lowest {number(low)}, highest {number(high)}"


def alt_of(what: str, lines: Sequence[Line]) -> str:
    """A line picture in words."""
    if len(lines) == 1:
        return f"{what}: {span_of(lines[0].y)}."
    each = "; ".join(f"{line.name} {span_of(line.y)}" for line in lines[:4])
    more = f"; and {len(lines) - 4} more" if len(lines) > 4 else ""
    return f"{what}: {each}{more}."
