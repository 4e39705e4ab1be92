"""Draw the attention grid and the expert grid over the same ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_moe.parallel.layout import ParallelLayout, RankGrid, local_experts
from megatron_moe.report.html import Html, el
from megatron_moe.report.picture import COLORS

CELL_HEIGHT, NAMES_WIDTH, HEAD_HEIGHT = 26, 74, 22
MIN_CELL_WIDTH, LETTER_WIDTH = 40, 7
MAX_CELLS = 16
"""Maximum number of rows and columns drawn; of a larger grid, the first ones."""


@dataclass(frozen=True, slots=True)
class _GridAxes:
    """The axes of a drawn grid, down and across, the slowest first."""

    down: tuple[str, str]
    across: tuple[str, str]


ATTENTION = _GridAxes(("dp", "cp"), ("tp", "tp"))
EXPERTS = _GridAxes(("edp", "edp"), ("ep", "etp"))


def draw_grids(layout: ParallelLayout, *, stage: int, num_experts: int) -> Html:
    """Draw one pipeline stage in both grids. Each color is an ep rank, which shows the folding."""
    attention = _draw(layout.attention, ATTENTION, layout, stage, "attention", {})
    held = {
        ep: _range(local_experts(layout, rank=rank, num_experts=num_experts))
        for rank, ep in _ep_ranks(layout)
    }
    experts = _draw(layout.experts, EXPERTS, layout, stage, "experts", held)
    return el("div", attention, experts, class_="grids")


def _ep_ranks(layout: ParallelLayout) -> list[tuple[int, int]]:
    """Return one rank for each ep coordinate."""
    etp = layout.experts.size("etp")
    return [(ep * etp, ep) for ep in range(layout.experts.size("ep"))]


def _range(held: range) -> str:
    return f"{held[0]}" if len(held) == 1 else f"{held[0]}\u2013{held[-1]}"


def _draw(
    grid: RankGrid,
    axes: _GridAxes,
    layout: ParallelLayout,
    stage: int,
    title: str,
    held: dict[int, str],
) -> Html:
    per_stage = _size(grid, axes.down) * _size(grid, axes.across)
    first, columns = stage * per_stage, _size(grid, axes.across)
    wide = max([MIN_CELL_WIDTH, *(LETTER_WIDTH * len(name) + 10 for name in held.values())])
    rows_shown, columns_shown = (min(n, MAX_CELLS) for n in (per_stage // columns, columns))
    parts: list[Html] = []
    for column in range(columns_shown):
        at = grid.coords(first + column)
        x = NAMES_WIDTH + (column + 0.5) * wide
        parts.append(_text(x, 15, _named(at, grid, axes.across), "axis"))
        if held:
            y = HEAD_HEIGHT + rows_shown * CELL_HEIGHT + 15
            parts.append(_text(x, y, held[at["ep"]], "held"))
    for row in range(rows_shown):
        y = HEAD_HEIGHT + row * CELL_HEIGHT
        start = first + row * columns
        parts.append(_text(4, y + 17, _named(grid.coords(start), grid, axes.down), "name"))
        parts += [
            _cell(NAMES_WIDTH + c * wide, y, wide, start + c, layout) for c in range(columns_shown)
        ]
    if held:
        parts.append(_text(4, HEAD_HEIGHT + rows_shown * CELL_HEIGHT + 15, "holds", "name"))
    width = NAMES_WIDTH + columns_shown * wide + 4
    height = HEAD_HEIGHT + rows_shown * CELL_HEIGHT + (22 if held else 4)
    shape = " x ".join(f"{axis}{n}" for axis, n in zip(grid.axes, grid.shape, strict=True))
    alt = f"{title}: {shape}; stage {stage}, ranks {first} to {first + per_stage - 1}."
    svg = el(
        "svg", parts, viewBox=f"0 0 {width} {height}", width=width, height=height,
        role="img", aria_label=alt, class_="grid",
    )  # fmt: skip
    cut = _cut(per_stage // columns, columns)
    label = f"{title} grid, stage {stage}"
    scroll = el("div", svg, class_="scroll", tabindex=0, role="region", aria_label=label)
    return el("div", el("h4", f"{title}: {shape}"), scroll, el("p", cut) if cut else None)


def _size(grid: RankGrid, axes: Sequence[str]) -> int:
    size = 1
    for axis in dict.fromkeys(axes):
        size *= grid.size(axis)
    return size


def _named(at: dict[str, int], grid: RankGrid, axes: Sequence[str]) -> str:
    """Format coordinates on axes with more than one rank, or on the first axis if there is none."""
    unique = list(dict.fromkeys(axes))
    shown = [axis for axis in unique if grid.size(axis) > 1] or unique[:1]
    return " ".join(f"{axis}{at[axis]}" for axis in shown)


def _cell(x: float, y: float, wide: float, rank: int, layout: ParallelLayout) -> Html:
    ep = layout.experts.coords(rank)["ep"]
    box = el(
        "rect", x=x + 1, y=y + 1, width=wide - 2, height=CELL_HEIGHT - 2, rx=3,
        style=f"fill:var(--line-{ep % COLORS})", fill_opacity=0.28,
    )  # fmt: skip
    return el("g", box, _text(x + wide / 2, y + 17, str(rank), "rank"))


def _text(x: float, y: float, text: str, kind: str) -> Html:
    return el("text", text, x=f"{x:g}", y=f"{y:g}", class_=kind)


def _cut(rows: int, columns: int) -> str:
    """Describe the rows and columns that are not drawn."""
    sizes = [(rows, "rows"), (columns, "columns")]
    hidden = [f"{n - MAX_CELLS} more {name}" for n, name in sizes if n > MAX_CELLS]
    return f"{' and '.join(hidden)} are not shown." if hidden else ""
