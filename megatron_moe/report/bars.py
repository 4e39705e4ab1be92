"""Draw the parts of a whole as horizontal bars, as inline SVG in the page's colors."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_moe.report.html import Html, el, number, table
from megatron_moe.report.parts import figure

WIDTH, ROW_HEIGHT, TEXT_HEIGHT, BAR_HEIGHT = 400, 34, 16, 9
SMALLEST_SHARE = 0.001
"""Parts below this share of the whole are in the table only."""


def bar_figure(title: str, parts: Mapping[str, float], *, unit: str, note: str) -> Html:
    """Return a figure with one bar per part, the largest first, and a table of all parts."""
    whole = sum(parts.values())
    ordered = sorted(parts.items(), key=lambda part: -part[1])
    drawn = [(name, value) for name, value in ordered if value >= SMALLEST_SHARE * whole]
    rows = [[name, number(value), f"{_percent(value, whole)}"] for name, value in ordered]
    numbers = table(["part", unit, "share"], [*rows, ["sum", number(whole), ""]], caption=title)
    return figure(title, _bars(title, drawn, whole, unit), numbers, note=note)


def _bars(title: str, parts: list[tuple[str, float]], whole: float, unit: str) -> Html:
    """Draw each bar below its name and value, so that names of any length fit."""
    longest = max((value for _, value in parts), default=1.0) or 1.0
    shapes: list[Html] = []
    for index, (name, value) in enumerate(parts):
        top = index * ROW_HEIGHT
        shown = f"{value:.3g} {unit}, {_percent(value, whole)}"
        shapes += [
            el("text", name, x=0, y=top + TEXT_HEIGHT - 3, class_="name"),
            el(
                "text", shown, x=WIDTH, y=top + TEXT_HEIGHT - 3, text_anchor="end", class_="value"
            ),
            el(
                "rect", x=0, y=top + TEXT_HEIGHT, width=f"{max(1.0, WIDTH * value / longest):.1f}",
                height=BAR_HEIGHT, rx=2, style="fill:var(--line-0)",
            ),
        ]  # fmt: skip
    largest = ", ".join(f"{name} {_percent(value, whole)}" for name, value in parts[:3])
    return el(
        "svg", shapes, viewBox=f"0 0 {WIDTH} {max(1, len(parts)) * ROW_HEIGHT}", role="img",
        aria_label=f"{title}: {largest}.", class_="picture bars",
    )  # fmt: skip


def _percent(value: float, whole: float) -> str:
    return f"{value / whole:.1%}" if whole else "-"
