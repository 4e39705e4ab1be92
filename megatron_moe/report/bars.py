"""Draw the parts of a whole as horizontal bars, as inline SVG in the page's colors."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_moe.report.html import Html, el, number, table
from megatron_moe.report.parts import figure

WIDTH, ROW_HEIGHT, NAMES_WIDTH, VALUE_WIDTH = 520, 24, 244, 110
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
    longest = max((value for _, value in parts), default=1.0) or 1.0
    wide = WIDTH - NAMES_WIDTH - VALUE_WIDTH
    shapes: list[Html] = []
    for index, (name, value) in enumerate(parts):
        y = index * ROW_HEIGHT
        length = max(1.0, wide * value / longest)
        shapes += [
            el("text", name, x=NAMES_WIDTH - 8, y=y + 16, text_anchor="end", class_="name"),
            el(
                "rect", x=NAMES_WIDTH, y=y + 4, width=f"{length:.1f}", height=ROW_HEIGHT - 8, rx=2,
                style="fill:var(--line-0)",
            ),
            el(
                "text", f"{value:.3g} {unit}, {_percent(value, whole)}",
                x=f"{NAMES_WIDTH + length + 6:.1f}", y=y + 16, class_="value",
            ),
        ]  # fmt: skip
    largest = ", ".join(f"{name} {_percent(value, whole)}" for name, value in parts[:3])
    return el(
        "svg", shapes, viewBox=f"0 0 {WIDTH} {max(1, len(parts)) * ROW_HEIGHT}", role="img",
        aria_label=f"{title}: {largest}.", class_="picture bars",
    )  # fmt: skip


def _percent(value: float, whole: float) -> str:
    return f"{value / whole:.1%}" if whole else "-"
