"""Draw lines and heat maps as inline SVG with matplotlib.

With matplotlib, a report of 20 pictures stays below 1 MB and needs no script, so that nothing in a
name can be executed, and mail clients and archives can show it; plotly needs 4.7 MB of script.
Colors are CSS variables of the page, which follow the reader's light or dark scheme. Text stays
text, at least 9 pixels high if the page is 360 pixels wide.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import Colormap, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from megatron_moe.report.history import Array
from megatron_moe.report.html import Html, el, number, plain

WIDTH, HEIGHT = 400, 220
"""Size of a picture in its own pixels; the page scales it."""
LETTER_WIDTH = 6.3
"""Approximate width of a letter of the axis labels."""
MAX_LINES = 16
INK, MUTED, GRID = "#000001", "#000002", "#000003"
COLORS = 8
DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1.2, 2)))
_CSS_DASHES = ("", "5 2", "1.2 1.6", "6 2 1.2 2")
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "text.parse_math": False,  # a name may contain a $
    "axes.unicode_minus": False,
    "font.size": 11.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.xmargin": 0.02,
    "axes.formatter.useoffset": False,
}
_SVG = "{http://www.w3.org/2000/svg}"
_XLINK = "{http://www.w3.org/1999/xlink}"


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """Values over steps, or over the picture's other axis."""

    name: str
    x: ArrayLike
    y: Array
    low: Array | None = None
    """Lower edge of the band around the line; requires ``high``."""
    high: Array | None = None
    dots: bool = False
    """Whether to mark each value with a dot."""
    color: int | None = None
    """Index in the palette; None takes the index among the picture's lines."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows or columns of a heat map."""

    label: str
    names: Sequence[str]
    all: bool = False
    """Whether to label every row instead of evenly spaced ones."""
    steps: NDArray[np.int64] | None = None
    """The step of each row, if rows are steps; round steps are labeled then."""

    @classmethod
    def of_steps(cls, steps: NDArray[np.int64]) -> Rows:
        """Return the axis of a picture whose columns each end at a step."""
        return cls("step", [f"{step:,}" for step in steps], steps=steps)


@dataclass(frozen=True, slots=True)
class Scale:
    """Mapping from values to colors. Both color maps work for readers with color blindness."""

    label: str
    kind: Literal["sequential", "around_one"] = "sequential"
    low: float = 0.0
    high: float = 1.0

    @classmethod
    def of(cls, values: Array, label: str, *, low: float | None = None) -> Scale:
        """Return a scale from the lowest to the highest value."""
        finite = values[np.isfinite(values)]
        bottom = float(finite.min()) if low is None else low
        top = float(finite.max())
        return cls(label, "sequential", bottom, top if top > bottom else bottom + 1)

    @classmethod
    def around_one(cls, values: Array, label: str) -> Scale:
        """Return a logarithmic scale centered at one, which clips factors beyond eight."""
        positive = values[np.isfinite(values) & (values > 0)]
        extreme = float(np.abs(np.log2(positive)).max()) if len(positive) else 1.0
        limit = 2 ** min(3.0, max(0.5, extreme))
        return cls(label, "around_one", 1 / limit, limit)

    def colors(self, values: Array) -> Any:
        """Return the RGBA bytes of values; values that are not finite are transparent."""
        with np.errstate(divide="ignore"):
            scaled = np.log2(values) if self.kind == "around_one" else values
        low, high = self._ends()
        fraction = np.clip((scaled - low) / (high - low), 0, 1)
        return self._map(np.ma.masked_invalid(fraction), bytes=True)

    def legend(self) -> Html:
        """Return the scale as a color strip with its end values."""
        stops = [to_hex(self._map(x)) for x in np.linspace(0, 1, 9)]
        strip = el("i", style=f"background:linear-gradient(90deg,{','.join(stops)})")
        middle = el("span", "1") if self.kind == "around_one" else None
        ends = el("span", number(self.low)), el("span", number(self.high))
        inner = el("span", ends[0], middle, ends[1], class_="ends")
        return el("div", el("span", self.label, class_="what"), strip, inner, class_="scale")

    @property
    def _map(self) -> Colormap:
        name = "PuOr_r" if self.kind == "around_one" else "cividis"
        return mpl.colormaps[name].with_extremes(bad=(0, 0, 0, 0))

    def _ends(self) -> tuple[float, float]:
        if self.kind == "around_one":
            return float(np.log2(self.low)), float(np.log2(self.high))
        return self.low, self.high


def line_picture(
    lines: Sequence[Line],
    *,
    alt: str,
    y: str,
    x: str = "step",
    logarithmic: bool = False,
    from_zero: bool = False,
    level: tuple[str, float] | None = None,
) -> Html:
    """Draw lines over a common axis, with a text legend below if there are several.

    Args:
        lines: The lines; at most ``MAX_LINES`` are drawn.
        alt: Description for readers who cannot see the picture.
        y: Label of the y axis.
        x: Label of the x axis.
        logarithmic: Whether the y axis may be logarithmic.
        from_zero: Whether the y axis starts at zero.
        level: Name and value of a horizontal reference line.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(HEIGHT)
        for index, line in enumerate(lines[:MAX_LINES]):
            _draw(axes, line, index)
        if level is not None:
            axes.axhline(level[1], color=INK, linewidth=1, linestyle=(0, (2, 3)))
        axes.set_xlabel(x)
        axes.set_title(y, loc="left", fontsize=11.5, color=MUTED)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.yaxis.set_major_formatter(lambda value, _: number(float(f"{value:.6g}")))
        _limits(axes, lines, level, logarithmic=logarithmic, from_zero=from_zero)
        _set_margins(axes, HEIGHT)
        picture = _svg(figure, alt)
    several = len(lines) > 1 or level is not None
    return Html(picture + (_legend(lines, level) if several else ""))


def _axes(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH / 72, height / 72), facecolor="none")
    return figure, figure.add_axes((0, 0, 1, 1), facecolor="none")


def _set_margins(axes: Axes, height: float) -> None:
    """Set margins that fit the labels; matplotlib's own layouts would draw each picture twice."""
    widest = max((len(label.get_text()) for label in axes.get_yticklabels()), default=0)
    left, right, top, bottom = 12 + LETTER_WIDTH * widest, 16, 20, 38
    axes.set_position(
        (left / WIDTH, bottom / height, 1 - (left + right) / WIDTH, 1 - (top + bottom) / height)
    )


def _draw(axes: Axes, line: Line, index: int) -> None:
    index = index if line.color is None else line.color
    color, dash = _color(index), DASHES[_dash(index)]
    few = line.dots or np.isfinite(line.y).sum() < 3
    if line.low is not None and line.high is not None:
        axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.2, linewidth=0)
    axes.plot(
        line.x, line.y, color=color, linestyle=dash, linewidth=1.6,
        marker="o" if few else "", markersize=3.5,
    )  # fmt: skip


def _color(index: int) -> str:
    return f"#0001{index % COLORS:02x}"


def _dash(index: int) -> int:
    """Return a dash style that differs between adjacent lines, and between lines of one color."""
    return (index + index // COLORS) % len(DASHES)


def _limits(
    axes: Axes,
    lines: Sequence[Line],
    level: tuple[str, float] | None,
    *,
    logarithmic: bool,
    from_zero: bool,
) -> None:
    """Set y limits that show all lines and most of their bands; spikes of a band are clipped."""
    means = _finite([line.y for line in lines] + ([np.array([level[1]])] if level else []))
    bands = _finite([b for line in lines for b in (line.low, line.high) if b is not None])
    edges = np.percentile(bands, [5, 95]) if len(bands) else means[:1]
    low, high = float(min(means.min(), *edges)), float(max(means.max(), *edges))
    if logarithmic and low > 0 and high > 20 * low:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.3, high * 1.3)
        axes.yaxis.set_major_formatter(lambda value, _: number(float(f"{value:.3g}")))
        axes.yaxis.set_minor_formatter(lambda value, _: "")
        return
    if from_zero and low >= 0:
        axes.set_ylim(0, 1.06 * high or 1)
        return
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    axes.set_ylim(low - margin, high + margin)


def _finite(values: Sequence[Array]) -> Array:
    flat = np.concatenate([np.zeros(0), *values])
    return flat[np.isfinite(flat)]


def _legend(lines: Sequence[Line], level: tuple[str, float] | None) -> Html:
    items = [
        el("li", _swatch(_index(line, i)), el("bdi", line.name), " ", _last(line.y))
        for i, line in enumerate(lines[:MAX_LINES])
    ]
    if level is not None:
        swatch = _swatch_of("var(--ink)", "2 3")
        items.append(el("li", swatch, level[0], " ", el("span", number(level[1]), class_="value")))
    if len(lines) > MAX_LINES:
        items.append(el("li", f"and {len(lines) - MAX_LINES} more, in the table"))
    return el("ul", items, class_="legend")


def _index(line: Line, index: int) -> int:
    return index if line.color is None else line.color


def _swatch(index: int) -> Html:
    return _swatch_of(f"var(--line-{index % COLORS})", _CSS_DASHES[_dash(index)])


def _swatch_of(color: str, dashes: str) -> Html:
    stroke = el(
        "line", x1=0, y1=4, x2=26, y2=4, stroke_width=2.2, stroke_dasharray=dashes or None,
        style=f"stroke:{color}",
    )  # fmt: skip
    return el("svg", stroke, viewBox="0 0 26 8", width=26, height=8, aria_hidden="true")


def _last(values: Array) -> Html:
    finite = values[np.isfinite(values)]
    return el("span", number(float(finite[-1])) if len(finite) else "", class_="value")


def heat_picture(
    values_RC: Array,
    *,
    rows: Rows,
    columns: Rows,
    scale: Scale,
    alt: str,
    height: float | None = None,
) -> Html:
    """Draw a heat map with its scale below; the first row is at the bottom."""
    with mpl.rc_context({**_STYLE, "axes.grid": False}):
        height = height or min(360, max(120, 62 + 15 * len(values_RC)))
        figure, axes = _axes(height)
        axes.imshow(scale.colors(values_RC), aspect="auto", interpolation="none", origin="lower")
        axes.set_xlabel(columns.label)
        axes.set_title(rows.label, loc="left", fontsize=11.5, color=MUTED)
        axes.set_xticks(*_ticks(columns, 7))
        axes.set_yticks(*_ticks(rows, 9))
        _set_margins(axes, height)
        picture = _svg(figure, alt)
    return Html(picture + scale.legend())


def _ticks(rows: Rows, about: int) -> tuple[list[int], list[str]]:
    """Return positions and labels of ticks: each first, second, fourth, ... row, or round steps."""
    count = len(rows.names)
    if rows.steps is not None and count > about:
        first, last = rows.steps[0], rows.steps[-1]
        round_steps = MaxNLocator(5, integer=True).tick_values(float(first), float(last))
        shown = [int(step) for step in round_steps if first <= step <= last]
        return np.searchsorted(rows.steps, shown).tolist(), [f"{step:,}" for step in shown]
    strides = (factor * 10**power for power in range(6) for factor in (1, 2, 4, 5, 8))
    stride = 1 if rows.all else next(stride for stride in strides if count / stride <= about)
    return list(range(0, count, stride)), [_short(rows.names[i]) for i in range(0, count, stride)]


def _short(name: str) -> str:
    name = plain(name)
    return name if len(name) <= 16 else f"{name[:15]}\u2026"


# ---- from matplotlib's SVG file to inline SVG ----------------------------------------------------


def _svg(figure: Figure, alt: str) -> Html:
    raw = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the reader's font draws the text
        FigureCanvasSVG(figure).print_svg(raw, metadata=dict.fromkeys(_METADATA))
    return _inline(raw.getvalue(), alt)


_METADATA = ("Date", "Creator", "Format", "Type")


def _inline(raw: bytes, alt: str) -> Html:
    """Convert an SVG file to inline SVG: drop metadata, make ids unique, use the page's colors."""
    ElementTree.register_namespace("", _SVG[1:-1])
    ElementTree.register_namespace("xlink", _XLINK[1:-1])
    root = ElementTree.fromstring(raw)
    prefix = hashlib.sha256(raw + alt.encode()).hexdigest()[:8]
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style"):
                parent.remove(child)
    used = set(re.findall(rb'(?:url\(|href=")#([^")]+)', raw))
    for element in root.iter():
        if (name := element.get("id")) is not None:
            if name.encode() in used:
                element.set("id", f"{prefix}-{name}")
            else:
                del element.attrib["id"]
        for key in ("clip-path", f"{_XLINK}href"):
            if "#" in (value := element.get(key, "")) and not value.startswith("data:"):
                element.set(key, value.replace("#", f"#{prefix}-", 1))
        if (style := element.get("style")) is not None:
            element.set("style", _themed(style))
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"role": "img", "aria-label": plain(alt), "class": "picture"}
    return Html(ElementTree.tostring(root, encoding="unicode"))


def _themed(style: str) -> str:
    """Replace placeholder colors by the page's CSS variables, and the font by the page's font."""
    style = re.sub(r"font: [^;]*;?", lambda match: _font(match[0]), style)
    for color, name in ((INK, "ink"), (MUTED, "muted"), (GRID, "grid")):
        style = style.replace(color, f"var(--{name})")
    return re.sub(r"#0001([0-9a-f]{2})", lambda match: f"var(--line-{int(match[1], 16)})", style)


def _font(style: str) -> str:
    """Keep only the font size; the page sets the family."""
    match = re.search(r"([\d.]+)px", style)
    return f"font-size: {match[1]}px;" if match else ""
