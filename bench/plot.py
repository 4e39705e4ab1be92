"""Curves over logarithmic axes as SVG, without a library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 460, 300, 62, 42, 14, 14
COLOURS = ("#1f4e79", "#b5561c", "#3d7a3d", "#7a3d74")


@dataclass(frozen=True, slots=True)
class Curve:
    """One line."""

    name: str
    y: Sequence[float]


def log_log(x: Sequence[float], curves: Sequence[Curve], *, x_label: str, y_label: str) -> str:
    """An SVG of the curves, with a tick at every x and at powers of ten and thrice them."""
    every = [value for curve in curves for value in curve.y]
    low, high = _decade_below(min(every)), _decade_above(max(every))

    def at_x(value: float) -> float:
        share = math.log(value / x[0]) / math.log(x[-1] / x[0])
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def at_y(value: float) -> float:
        share = math.log(value / low) / math.log(high / low)
        return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for value in _ticks(low, high):
        y = at_y(value)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    parts += [
        f'<text x="{at_x(value):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:g}'
        "</text>"
        for value in x
    ]
    for index, curve in enumerate(curves):
        points = " ".join(f"{at_x(a):.1f},{at_y(b):.1f}" for a, b in zip(x, curve.y, strict=True))
        colour = COLOURS[index % len(COLOURS)]
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        parts.append(
            f'<text x="{LEFT + 8}" y="{TOP + 14 + 15 * index}" fill="{colour}">{curve.name}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{x_label}</text>')
    parts.append(
        f'<text transform="translate(14 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">'
        f"{y_label}</text></svg>"
    )
    return "\n".join(parts) + "\n"


def _ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    result = [base * 10**power for power in range(first, last + 1) for base in (1, 3)]
    return [value for value in result if low * 0.999 <= value <= high * 1.001]


def _decade_below(value: float) -> float:
    power = 10 ** math.floor(math.log10(value))
    return 3 * power if value >= 3 * power else power


def _decade_above(value: float) -> float:
    power = 10 ** math.floor(math.log10(value))
    return 3 * power if value <= 3 * power else 10 * power
