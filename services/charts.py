"""Line charts as inline SVG, coloured by the page's style sheet: no script, nothing to fetch, sharp in print."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

COLOURS, _DASHES = 8, 4  # of the style sheet
_CHARACTER = 6.4  # width of a digit at the charts' 11 px, in pixels
_LINE_HEIGHT = 13.0
_DOT_ROOM = 14.0  # a line has dots where they are so many pixels apart


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        pieces: points (x, y), ascending in x; pieces are not joined.
        style: its number: the first `COLOURS` are solid lines in a colour of their own, those behind them are dashed.
        marked: x of the points that are drawn larger and get their value as text.
    """

    name: str
    pieces: Sequence[Sequence[tuple[float, float]]]
    style: int = 0
    marked: Sequence[float] = ()

    @property
    def points(self) -> list[tuple[float, float]]:
        """All its points."""
        return [point for piece in self.pieces for point in piece]


@dataclass(frozen=True)
class Band:
    """A stretch of the x axis with a name: a stage."""

    start: float
    end: float
    label: str


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    size: tuple[int, int],
    labels: tuple[str, str],
    bands: Sequence[Band] = (),
    y_range: tuple[float, float] | None = None,
    show: Callable[[float], str] = "{:.1f}".format,
) -> Markup:
    """Lines over a common axis.

    Args:
        title: said to those who cannot see the chart, with the names of the lines where there are several.
        size: width and height in pixels; the texts are of one size in every chart, so a phone gets a chart of its own.
        labels: of the x and the y axis, with their units.
        bands: drawn behind the lines, with their names above where there is room.
        y_range: by default from zero, or from near the least value where that is far from zero, to the largest.
        show: a value as text.
    """
    points = [point for line in lines for point in line.points]
    if not points:
        return Markup("")
    low, high = y_range or value_range([y for _, y in points])
    first = min([x for x, _ in points] + [band.start for band in bands])
    last = max([x for x, _ in points] + [band.end for band in bands])
    ticks = axis_ticks(low, high, max(3, size[1] // 36))
    marked = any(line.marked for line in lines)
    left = 8 + _CHARACTER * max(len(number(tick)) for tick in ticks)
    top = 8 + 12 * bool(labels[1]) + 14 * any(band.label for band in bands)
    right = 10 + _CHARACTER * (len(show(high)) + 1) if marked else 8
    frame = _Frame(
        left,
        top,
        size[0] - left - right,
        size[1] - top - 32,
        first,
        max(last, first + 1e-9),
        low,
        max(high, low + 1e-12),
    )
    parts = [_bands(frame, bands), _axes(frame, ticks, labels)]
    parts += [_line(frame, line, show) for line in lines]
    parts.append(_values(frame, lines, show))
    said = title if len(lines) == 1 else f"{title}: {', '.join(line.name for line in lines)}"
    return Markup(
        f'<svg class="chart" viewBox="0 0 {size[0]} {size[1]}" width="{size[0]}" height="{size[1]}" role="img" '
        f'aria-label="{escape(said)}">{"".join(parts)}</svg>'
    )


def swatch(style: int) -> Markup:
    """A short stretch of a line in a style, for legends and tables."""
    return Markup(
        '<svg class="swatch" viewBox="0 0 26 8" width="26" height="8" aria-hidden="true">'
        f'<path class="line {_drawn(style)}" d="M0 4h26"/></svg>'
    )


def value_range(values: Sequence[float]) -> tuple[float, float]:
    """The range of an axis for these values: it begins at zero unless they all lie far from it."""
    low, high = min(values), max(values)
    if low >= 0 and low < 0.6 * high:
        return 0.0, high * 1.05
    margin = 0.08 * (high - low) or abs(high) * 0.1 or 1.0
    return (max(0.0, low - margin) if low >= 0 else low - margin), high + margin


def axis_ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers in a range: steps of 1, 2 or 5 times a power of ten, at most ``count`` or so."""
    step = 10.0 ** math.floor(math.log10(max(high - low, 1e-12) / max(1, count)))
    step = next(s for s in (step, 2 * step, 5 * step, 10 * step) if (high - low) / s <= count)
    return [round(n * step, 12) for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A tick's number: short, and without an exponent where that is short too."""
    if value and abs(value) < 1e-4:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:,.6g}"


@dataclass(frozen=True)
class _Frame:
    """Where the plot lies in the picture, and which values its edges are."""

    left: float
    top: float
    width: float
    height: float
    first: float
    last: float
    low: float
    high: float

    def x(self, value: float) -> float:
        return round(self.left + self.width * (value - self.first) / (self.last - self.first), 1)

    def y(self, value: float) -> float:
        return round(self.top + self.height * (self.high - value) / (self.high - self.low), 1)


def _bands(frame: _Frame, bands: Sequence[Band]) -> str:
    parts = []
    for place, band in enumerate(bands):
        x, end = frame.x(band.start), frame.x(band.end)
        if place % 2:
            parts.append(
                f'<rect class="band" x="{x}" y="{frame.top}" width="{end - x:.1f}" height="{frame.height:.1f}"/>'
            )
        if place:
            parts.append(f'<path class="edge" d="M{x} {frame.top - 14}V{frame.top + frame.height:.1f}"/>')
        room = int((end - x - 8) / _CHARACTER)
        text = band.label if len(band.label) <= room else band.label[: max(0, room - 1)] + "…"
        if room > 2:
            parts.append(
                f'<text class="stage" x="{x + (5 if place else 0)}" y="{frame.top - 6}">{escape(text)}'
                f"<title>{escape(band.label)}</title></text>"
            )
    return "".join(parts)


def _axes(frame: _Frame, ticks: Sequence[float], labels: tuple[str, str]) -> str:
    bottom = frame.top + frame.height
    parts = []
    for tick in ticks:
        y = frame.y(tick)
        parts.append(f'<path class="grid" d="M{frame.left:.1f} {y}h{frame.width:.1f}"/>')
        parts.append(f'<text class="tick end" x="{frame.left - 5:.1f}" y="{y + 3.8:.1f}">{number(tick)}</text>')
    count = min(frame.last - frame.first, frame.width // 48)  # epochs are whole
    for tick in axis_ticks(frame.first, frame.last, max(1, int(count))):
        x = frame.x(tick)
        parts.append(f'<path class="axis" d="M{x} {bottom:.1f}v4"/>')
        parts.append(f'<text class="tick mid" x="{x}" y="{bottom + 15:.1f}">{number(tick)}</text>')
    parts.append(f'<path class="axis" d="M{frame.left:.1f} {bottom:.1f}h{frame.width:.1f}"/>')
    x_label, y_label = labels
    parts.append(
        f'<text class="label end" x="{frame.left + frame.width:.1f}" y="{bottom + 28:.1f}">{escape(x_label)}</text>'
    )
    parts.append(f'<text class="label" x="0" y="10">{escape(y_label)}</text>')
    return "".join(parts)


def _line(frame: _Frame, line: Line, show: Callable[[float], str]) -> str:
    parts = []
    for piece in line.pieces:
        path = "L".join(f"{frame.x(x)} {frame.y(y)}" for x, y in piece)
        parts.append(f'<path class="line {_drawn(line.style)}" d="M{path}"/>')
    dotted = len(line.points) * _DOT_ROOM <= frame.width or len(line.points) == 1
    for x, y in line.points:
        if x in line.marked or dotted:
            radius = 3.6 if x in line.marked else 1.7
            parts.append(
                f'<circle class="dot {_coloured(line.style)}" cx="{frame.x(x)}" cy="{frame.y(y)}" r="{radius}">'
                f"<title>{escape(line.name)}, {number(x)}: {show(y)}</title></circle>"
            )
    return "".join(parts)


def _values(frame: _Frame, lines: Sequence[Line], show: Callable[[float], str]) -> str:
    """The values of the marked points: right of the last ones, kept apart from each other, and left above the others."""
    parts, ends = [], []
    for line in lines:
        for x, y in line.points:
            if x not in line.marked:
                continue
            if frame.x(x) > frame.left + frame.width - 24:
                ends.append((frame.y(y) + 3.8, frame.x(x), line, y))
            else:
                parts.append(_value(frame.x(x) - 6, frame.y(y) - 6, "end", line, show(y)))
    lowest = -math.inf
    for y, x, line, value in sorted(ends, key=lambda end: end[0]):
        lowest = max(y, lowest + _LINE_HEIGHT)
        parts.append(_value(x + 7, lowest, "", line, show(value)))
    return "".join(parts)


def _value(x: float, y: float, anchor: str, line: Line, text: str) -> str:
    return f'<text class="value {_coloured(line.style)} {anchor}" x="{x:.1f}" y="{y:.1f}">{text}</text>'


def _coloured(style: int) -> str:
    return f"c{style % COLOURS}"


def _drawn(style: int) -> str:
    return f"{_coloured(style)} d{style // COLOURS % _DASHES}"
