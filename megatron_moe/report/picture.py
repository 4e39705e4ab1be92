"""Lines and heat maps as SVG in the page, by matplotlib.

Why matplotlib: a report of 20 pictures stays below 1 MB and needs no script, so that nothing in a
name can run and a mail or an archive shows it; plotly puts 4.7 MB of script before the first point.
The colours of a picture are the page's variables, which follow the reader's light or dark scheme;
its text is text, drawn at least 9 pixels high where the page is 360 wide.
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
"""Pixels of a picture's own coordinates; the page scales it."""
LETTER = 6.3
"""Width of a letter of the axes' labels, about."""
MOST_LINES = 16
INK, MUTED, GRID = "#000001", "#000002", "#000003"
COLOURS = 8
DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1.2, 2)))
_CSS_DASHES = ("", "5 2", "1.2 1.6", "6 2 1.2 2")
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "text.parse_math": False,  # a name may hold a $
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
    """Values over steps, or over whatever the picture's axis is."""

    name: str
    x: ArrayLike
    y: Array
    low: Array | None = None
    """With ``high``: the band around the line."""
    high: Array | None = None
    dots: bool = False
    """Few values, each worth a dot."""
    colour: int | None = None
    """Place in the palette; None: the place among the picture's lines."""


@dataclass(frozen=True, slots=True)
class Rows:
    """One direction of a heat map."""

    label: str
    names: Sequence[str]
    all: bool = False
    """Whether every name is worth its room, not evenly spaced ones."""
    steps: NDArray[np.int64] | None = None
    """What the names are numbers of; round ones are written out then."""

    @classmethod
    def of_steps(cls, steps: NDArray[np.int64]) -> Rows:
        """Columns of a picture, each up to a step."""
        return cls("step", [f"{step:,}" for step in steps], steps=steps)


@dataclass(frozen=True, slots=True)
class Scale:
    """How values become colours. Both maps are told apart by eyes that see no red or no green."""

    label: str
    kind: Literal["sequential", "around_one"] = "sequential"
    low: float = 0.0
    high: float = 1.0

    @classmethod
    def of(cls, values: Array, label: str, *, low: float | None = None) -> Scale:
        """From the lowest to the highest value."""
        finite = values[np.isfinite(values)]
        bottom = float(finite.min()) if low is None else low
        top = float(finite.max())
        return cls(label, "sequential", bottom, top if top > bottom else bottom + 1)

    @classmethod
    def around_one(cls, values: Array, label: str) -> Scale:
        """Factors: twice is as far from one as half; further than eight times looks like it."""
        positive = values[np.isfinite(values) & (values > 0)]
        furthest = float(np.abs(np.log2(positive)).max()) if len(positive) else 1.0
        reach = 2 ** min(3.0, max(0.5, furthest))
        return cls(label, "around_one", 1 / reach, reach)

    def colours(self, values: Array) -> Any:
        """RGBA bytes of values; what is not finite is transparent."""
        with np.errstate(divide="ignore"):
            place = np.log2(values) if self.kind == "around_one" else values
        low, high = self._ends()
        shown = np.clip((place - low) / (high - low), 0, 1)
        return self._map(np.ma.masked_invalid(shown), bytes=True)

    def legend(self) -> Html:
        """The scale as a strip with its ends."""
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
    """Lines over a common axis, with a legend of text below where there are several.

    Args:
        lines: At most ``MOST_LINES`` are drawn.
        alt: What a reader who sees no picture should know.
        y: Name of the values.
        x: Name of the axis.
        logarithmic: Whether values are so.
        from_zero: Whether the axis of values starts at zero.
        level: A value to compare with, by name: a line across.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(HEIGHT)
        for index, line in enumerate(lines[:MOST_LINES]):
            _draw(axes, line, index)
        if level is not None:
            axes.axhline(level[1], color=INK, linewidth=1, linestyle=(0, (2, 3)))
        axes.set_xlabel(x)
        axes.set_title(y, loc="left", fontsize=11.5, color=MUTED)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.yaxis.set_major_formatter(lambda value, _: number(float(f"{value:.6g}")))
        _limits(axes, lines, level, logarithmic=logarithmic, from_zero=from_zero)
        _place(axes, HEIGHT)
        picture = _svg(figure, alt)
    several = len(lines) > 1 or level is not None
    return Html(picture + (_legend(lines, level) if several else ""))


def _axes(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH / 72, height / 72), facecolor="none")
    return figure, figure.add_axes((0, 0, 1, 1), facecolor="none")


def _place(axes: Axes, height: float) -> None:
    """Margins that hold the labels; matplotlib's own layouts draw each picture twice for them."""
    widest = max((len(label.get_text()) for label in axes.get_yticklabels()), default=0)
    left, right, top, bottom = 12 + LETTER * widest, 16, 20, 38
    axes.set_position(
        (left / WIDTH, bottom / height, 1 - (left + right) / WIDTH, 1 - (top + bottom) / height)
    )


def _draw(axes: Axes, line: Line, index: int) -> None:
    index = index if line.colour is None else line.colour
    colour, dash = _colour(index), DASHES[_dash(index)]
    few = line.dots or np.isfinite(line.y).sum() < 3
    if line.low is not None and line.high is not None:
        axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(
        line.x, line.y, color=colour, linestyle=dash, linewidth=1.6,
        marker="o" if few else "", markersize=3.5,
    )  # fmt: skip


def _colour(index: int) -> str:
    return f"#0001{index % COLOURS:02x}"


def _dash(index: int) -> int:
    """So that neighbours differ in it, and lines of one colour too."""
    return (index + index // COLOURS) % len(DASHES)


def _limits(
    axes: Axes,
    lines: Sequence[Line],
    level: tuple[str, float] | None,
    *,
    logarithmic: bool,
    from_zero: bool,
) -> None:
    """Room for every line and most of its band; a spike of the band is cut."""
    means = _finite([line.y for line in lines] + ([np.array([level[1]])] if level else []))
    bands = _finite([b for line in lines for b in (line.low, line.high) if b is not None])
    most = np.percentile(bands, [5, 95]) if len(bands) else means[:1]
    low, high = float(min(means.min(), *most)), float(max(means.max(), *most))
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
    every = np.concatenate([np.zeros(0), *values])
    return every[np.isfinite(every)]


def _legend(lines: Sequence[Line], level: tuple[str, float] | None) -> Html:
    items = [
        el("li", _swatch(_index(line, i)), el("bdi", line.name), " ", _last(line.y))
        for i, line in enumerate(lines[:MOST_LINES])
    ]
    if level is not None:
        swatch = _swatch_of("var(--ink)", "2 3")
        items.append(el("li", swatch, level[0], " ", el("span", number(level[1]), class_="value")))
    if len(lines) > MOST_LINES:
        items.append(el("li", f"and {len(lines) - MOST_LINES} more, in the table"))
    return el("ul", items, class_="legend")


def _index(line: Line, place: int) -> int:
    return place if line.colour is None else line.colour


def _swatch(index: int) -> Html:
    return _swatch_of(f"var(--line-{index % COLOURS})", _CSS_DASHES[_dash(index)])


def _swatch_of(colour: str, dashes: str) -> Html:
    stroke = el(
        "line", x1=0, y1=4, x2=26, y2=4, stroke_width=2.2, stroke_dasharray=dashes or None,
        style=f"stroke:{colour}",
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
    """A heat map with its scale below; the first row is at the bottom, as depth and time grow."""
    with mpl.rc_context({**_STYLE, "axes.grid": False}):
        height = height or min(360, max(120, 62 + 15 * len(values_RC)))
        figure, axes = _axes(height)
        axes.imshow(scale.colours(values_RC), aspect="auto", interpolation="none", origin="lower")
        axes.set_xlabel(columns.label)
        axes.set_title(rows.label, loc="left", fontsize=11.5, color=MUTED)
        axes.set_xticks(*_ticks(columns, 7))
        axes.set_yticks(*_ticks(rows, 9))
        _place(axes, height)
        picture = _svg(figure, alt)
    return Html(picture + scale.legend())


def _ticks(rows: Rows, about: int) -> tuple[list[int], list[str]]:
    """Places that are written out: every first, second, fifth, tenth, ... or at round steps."""
    count = len(rows.names)
    if rows.steps is not None and count > about:
        first, last = rows.steps[0], rows.steps[-1]
        round_ones = MaxNLocator(5, integer=True).tick_values(float(first), float(last))
        shown = [int(step) for step in round_ones if first <= step <= last]
        return np.searchsorted(rows.steps, shown).tolist(), [f"{step:,}" for step in shown]
    steps = (factor * 10**power for power in range(6) for factor in (1, 2, 4, 5, 8))
    every = 1 if rows.all else next(step for step in steps if count / step <= about)
    return list(range(0, count, every)), [_short(rows.names[i]) for i in range(0, count, every)]


def _short(name: str) -> str:
    name = plain(name)
    return name if len(name) <= 16 else f"{name[:15]}\u2026"


# ---- matplotlib's file to a part of the page -----------------------------------------------------


def _svg(figure: Figure, alt: str) -> Html:
    raw = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the reader's font draws the text
        FigureCanvasSVG(figure).print_svg(raw, metadata=dict.fromkeys(_METADATA))
    return _inline(raw.getvalue(), alt)


_METADATA = ("Date", "Creator", "Format", "Type")


def _inline(raw: bytes, alt: str) -> Html:
    """Take out what belongs to a file of its own, name ids apart, and take the page's colours."""
    ElementTree.register_namespace("", _SVG[1:-1])
    ElementTree.register_namespace("xlink", _XLINK[1:-1])
    root = ElementTree.fromstring(raw)
    own = hashlib.sha256(raw + alt.encode()).hexdigest()[:8]
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style"):
                parent.remove(child)
    used = set(re.findall(rb'(?:url\(|href=")#([^")]+)', raw))
    for element in root.iter():
        if (name := element.get("id")) is not None:
            if name.encode() in used:
                element.set("id", f"{own}-{name}")
            else:
                del element.attrib["id"]
        for key in ("clip-path", f"{_XLINK}href"):
            if "#" in (value := element.get(key, "")) and not value.startswith("data:"):
                element.set(key, value.replace("#", f"#{own}-", 1))
        if (style := element.get("style")) is not None:
            element.set("style", _themed(style))
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"role": "img", "aria-label": plain(alt), "class": "picture"}
    return Html(ElementTree.tostring(root, encoding="unicode"))


def _themed(style: str) -> str:
    """The page's variables in place of the colours that stand for them, and the page's font."""
    style = re.sub(r"font: [^;]*;?", lambda found: _font(found[0]), style)
    for colour, name in ((INK, "ink"), (MUTED, "muted"), (GRID, "grid")):
        style = style.replace(colour, f"var(--{name})")
    return re.sub(r"#0001([0-9a-f]{2})", lambda found: f"var(--line-{int(found[1], 16)})", style)


def _font(style: str) -> str:
    """The size alone; the family is the page's."""
    found = re.search(r"([\d.]+)px", style)
    return f"font-size: {found[1]}px;" if found else ""
