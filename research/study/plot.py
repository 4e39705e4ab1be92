"""Draw docs/study.svg: training losses of related cases, with mean and range over seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

COLORS = ("#1b9e77", "#d95f02", "#7570b3", "#e7298a", "#66a61e", "#e6ab02", "#555555")
PANELS = (
    ("a factor for what is split (cf. LLaMA-MoE, fig. 3a)",
     ("split_random, N/K", "split_random, none", "split_random, N", "split_random, calibrated")),
    ("how to split (cf. LLaMA-MoE, fig. 3b)",
     ("split_random, N/K", "split_clustered, N/K", "sharing_inner, N/K",
      "split_random with shared, N/K", "sharing_inter, N/K", "weaver, N/K")),
    ("upcycled or from scratch (cf. LLaMA-MoE, fig. 3d)",
     ("dense", "copy", "split_random, N/K", "from scratch, whole", "from scratch, parts")),
    ("copies and replicas, and the order of softmax and top-k",
     ("dense", "copy", "copy, softmax_topk", "granular", "granular, softmax_topk", "qwen", "drop",
      "mix")),
)  # fmt: skip
WINDOW = 3
"""Number of steps averaged in a point of a curve."""
WIDTH, HEIGHT, PANEL = 760, 1040, 250


def plots(numbers: dict[str, Any]) -> str:
    """Return the SVG with one panel per question."""
    panels = [
        line
        for index, (title, cases) in enumerate(PANELS)
        for line in panel(title, _curves(numbers, cases), top=30 + PANEL * index)
    ]
    tokens = numbers["trained"][0]["validation"][-1][0]
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        *panels,
        f'<text x="260" y="{HEIGHT - 10}" text-anchor="middle">tokens, up to {tokens:,}; '
        "loss on the training text, nats per token; bands: all seeds</text>",
        "</svg>\n",
    ])  # fmt: skip


def _curves(numbers: dict[str, Any], cases: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """Return smoothed training losses ``(seeds, points)`` by case."""
    curves = {}
    for case in cases:
        runs = [run["training"] for run in numbers["trained"] if run["case"] == case]
        if runs:
            losses = np.asarray(runs, dtype=np.float64)
            points = losses[0].size // WINDOW
            curves[case] = losses[:, : points * WINDOW].reshape(len(runs), points, WINDOW).mean(2)
    return curves


def panel(title: str, curves: dict[str, NDArray[np.float64]], *, top: int) -> Iterator[str]:
    """Yield the SVG elements of a panel for losses ``(seeds, points)`` by case: mean and range."""
    left, width, height = 45, 430, PANEL - 50
    if not curves:
        return
    high = max(curve.max() for curve in curves.values())
    low = min(curve.min() for curve in curves.values())

    def x(point: int, points: int) -> float:
        return round(left + width * point / (points - 1), 1)

    def y(value: float) -> float:
        return round(float(top + height * (high - value) / (high - low)), 1)

    yield f'<text x="{left}" y="{top - 8}">{title}</text>'
    for i in range(5):
        value = low + (high - low) * i / 4
        yield (
            f'<path d="M{left} {y(value)}h{width}" stroke="#ddd"/>'
            f'<text x="{left - 5}" y="{y(value) + 4}" text-anchor="end">{value:.2f}</text>'
        )
    ends = sorted(curves, key=lambda case: -curves[case][:, -1].mean())
    for position, case in enumerate(ends):
        curve, color = curves[case], _color(list(curves).index(case))
        points = curve[0].size
        mean, lowest, highest = curve.mean(0), curve.min(0), curve.max(0)
        band = [(x(i, points), y(highest[i])) for i in range(points)]
        band += [(x(i, points), y(lowest[i])) for i in reversed(range(points))]
        line = [(x(i, points), y(mean[i])) for i in range(points)]
        yield f'<polygon points="{_joined(band)}" fill="{color}" opacity="0.15"/>'
        yield (
            f'<polyline points="{_joined(line)}" fill="none" stroke="{color}" stroke-width="1.5"/>'
        )
        yield (
            f'<text x="{left + width + 10}" y="{top + 12 + 20 * position}" fill="{color}">{case}: '
            f"{mean[-1]:.3f}</text>"
        )


def _color(index: int) -> str:
    return (*COLORS, "#000000")[index]


def _joined(points: list[tuple[float, float]]) -> str:
    return " ".join(f"{x},{y}" for x, y in points)
