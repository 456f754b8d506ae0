"""Line charts as SVG: series with their names beside them, markers, intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgeroute.tools.profile.markup import Markup, join, number, tag
from edgeroute.tools.profile.scales import Scale, shorten, spread, text_width

FONT_PX = 12
_ROW_PX = 16.0
_NARROW_PX = 420
Tick = tuple[float, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """The inside of an SVG image of `width` by `height` pixels."""

    width: float
    height: float
    body: Markup


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One axis: what it shows, from where to where, and its labelled ticks."""

    label: str
    low: float
    high: float
    ticks: Sequence[Tick]
    log: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line. `tone` is its colour and dash pattern (0: grey), `note` a figure by its name."""

    name: str
    points: Sequence[tuple[float, float]]
    tone: int
    note: str = ""
    strong: bool = False
    dots: bool = False
    intervals: Sequence[tuple[float, float]] = ()
    """Of each point, (low, high)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Marker:
    """A place on the x axis that is worth a line and a name; with `y` also a point."""

    x: float
    label: str
    y: float | None = None
    tone: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LineChart:
    """Lines over one x axis; `top` is a second reading of the same axis.

    `ranked` says what `note` of the series means: their names then stand in a column beside the
    plot, in their order; without it every name stands at the end of its line.
    """

    x: Axis
    y: Axis
    series: Sequence[Series]
    markers: Sequence[Marker] = ()
    top: Axis | None = None
    ranked: str = ""
    height: float = 240


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    """Where the plot area lies, and how values map into it."""

    x: Scale
    y: Scale
    left: float
    right: float
    top: float
    bottom: float


def words(
    x: float, y: float, text: str, classes: str = "", anchor: str | None = None, px: int = FONT_PX
) -> Markup:
    """Return a line of text whose baseline starts, or by `anchor` has its middle or end, at x."""
    name = f"word {classes}".rstrip()
    return tag("text", text, x=x, y=y, class_=name, text_anchor=anchor, font_size=px)


def straight(x1: float, y1: float, x2: float, y2: float, classes: str) -> Markup:
    """Return a line from one point to the other."""
    return tag("path", d=f"M{number(x1)} {number(y1)}L{number(x2)} {number(y2)}", class_=classes)


def line_chart(chart: LineChart, width: float) -> Drawing:
    """Draw the chart `width` pixels wide; narrow ones carry the names above instead of beside."""
    narrow = width < _NARROW_PX
    keys, keys_px = _keys(chart, width) if narrow or not chart.series else (Markup(), 0.0)
    beside = 0.0 if narrow else _beside_px(chart, width)
    left = 10 + max((text_width(text, FONT_PX) for _, text in chart.y.ticks), default=0)
    right = width - max(beside, 14)
    rows, n_row = _marker_rows(chart, left, right)
    top = 28 + keys_px + (30 if chart.top else 0) + n_row * _ROW_PX
    bottom = top + chart.height
    frame = _Frame(
        x=Scale(low=chart.x.low, high=chart.x.high, start=left, end=right, log=chart.x.log),
        y=Scale(low=chart.y.low, high=chart.y.high, start=bottom, end=top, log=chart.y.log),
        left=left,
        right=right,
        top=top,
        bottom=bottom,
    )
    body = join(
        (
            words(0, 12, chart.y.label, "soft"),
            keys,
            join(
                straight(
                    frame.x.at(one.x),
                    _marker_y(chart, frame, n_row - row) - 10,
                    frame.x.at(one.x),
                    bottom,
                    "rule",
                )
                for one, row in zip(chart.markers, rows, strict=True)
            ),
            _grid(chart, frame),
            join(_series(one, frame) for one in chart.series),
            _markers(chart, frame, rows, n_row),
            Markup() if narrow else _names(chart, frame, width),
        )
    )
    return Drawing(width=width, height=bottom + 42, body=body)


def x_labels(axis: Axis, scale: Scale, y: float) -> Markup:
    """Return the tick labels of an x axis, leaving out those that would touch the last one."""
    found: list[Markup] = []
    free = -math.inf
    for value, text in axis.ticks:
        half = text_width(text, FONT_PX) / 2
        middle = min(scale.at(value), max(scale.start, scale.end) + 12 - half)
        if middle - half >= free:
            found.append(words(middle, y, text, "soft halo", "middle"))
            free = middle + half + 6
    return join(found)


def _grid(chart: LineChart, frame: _Frame) -> Markup:
    parts = []
    for value, text in chart.y.ticks:
        y = frame.y.at(value)
        kind = "axis" if value == chart.y.low else "grid"
        parts.append(straight(frame.left, y, frame.right, y, kind))
        parts.append(words(frame.left - 6, y + 4, text, "soft", "end"))
    for value, _ in chart.x.ticks:
        x = frame.x.at(value)
        parts.append(straight(x, frame.bottom, x, frame.bottom + 4, "axis"))
    parts.append(x_labels(chart.x, frame.x, frame.bottom + 18))
    middle = (frame.left + frame.right) / 2
    parts.append(words(middle, frame.bottom + 36, chart.x.label, "soft", "middle"))
    if chart.top is not None:
        for value, _ in chart.top.ticks:
            x = frame.x.at(value)
            parts.append(straight(x, frame.top - 4, x, frame.top, "axis"))
        parts.append(straight(frame.left, frame.top, frame.right, frame.top, "grid"))
        parts.append(x_labels(chart.top, frame.x, frame.top - 8))
        parts.append(words(frame.right, 12, chart.top.label, "soft", "end"))
    return join(parts)


def _series(series: Series, frame: _Frame) -> Markup:
    at = [(frame.x.at(x), frame.y.at(y)) for x, y in series.points]
    strong = " strong" if series.strong else ""
    parts = []
    for (x, _), (low, high) in zip(at, series.intervals, strict=False):
        bottom, top = frame.y.at(low), frame.y.at(high)
        path = f"M{number(x)} {number(bottom)}V{number(top)}"
        path += "".join(f"M{number(x - 4)} {number(y)}H{number(x + 4)}" for y in (bottom, top))
        parts.append(tag("path", d=path, class_=f"curve s{series.tone}"))
    path = "M" + "L".join(f"{number(x)} {number(y)}" for x, y in at)
    if len(at) > 1:
        names = f"curve s{series.tone} d{0 if series.tone == 0 else series.tone}{strong}"
        parts.append(tag("path", d=path, class_=names))
    if series.dots or len(at) == 1:
        parts += [tag("circle", cx=x, cy=y, r=3.5, class_=f"f{series.tone}") for x, y in at]
    return join(parts)


def _label(series: Series) -> str:
    return f"{series.name} {series.note}".rstrip()


def _wide(series: Series) -> float:
    return text_width(_label(series), FONT_PX) * (1.1 if series.strong else 1.0)


def _beside_px(chart: LineChart, width: float) -> float:
    widest = max((_wide(one) for one in chart.series), default=0.0)
    if chart.ranked:
        widest = max(widest + 32, text_width(chart.ranked, FONT_PX))
    return min(widest + 18, width * 0.36)


def _names(chart: LineChart, frame: _Frame, width: float) -> Markup:
    """Return the names beside the plot: at the ends of their lines, or one below the other."""
    shown = [one for one in chart.series if one.points]
    x, room = frame.right + 14, width - frame.right - 16
    if chart.ranked:
        head = words(x, frame.top + 10, shorten(chart.ranked, room, FONT_PX), "soft")
        return join((head, *(_ranked(one, x, frame.top + 34 + 22 * i, width)
                             for i, one in enumerate(shown))))  # fmt: skip
    ends = [frame.y.at(one.points[-1][1]) for one in shown]
    places = spread(ends, _ROW_PX, frame.top + 2, frame.bottom - 2)
    parts = []
    for one, end, y in zip(shown, ends, places, strict=True):
        last = frame.x.at(one.points[-1][0])
        lead = f"M{number(last + 5)} {number(end)}L{number(x - 3)} {number(y)}"
        parts.append(tag("path", d=lead, class_=f"lead s{one.tone}"))
        strong = " strong" if one.strong else ""
        parts.append(words(x, y + 4, shorten(_label(one), room, FONT_PX), f"f{one.tone}{strong}"))
    return join(parts)


def _ranked(series: Series, x: float, y: float, width: float) -> Markup:
    strong = " strong" if series.strong else ""
    room = width - x - 30 - text_width(series.note, FONT_PX)
    return join(
        (
            _swatch(series, x, y - 4),
            words(x + 28, y, shorten(series.name, room, FONT_PX), f"f{series.tone}{strong}"),
            words(width - 2, y, series.note, f"f{series.tone}{strong}", "end"),
        )
    )


def _swatch(series: Series, x: float, y: float) -> Markup:
    strong = " strong" if series.strong else ""
    return straight(x, y, x + 22, y, f"curve s{series.tone} d{series.tone}{strong}")


def _keys(chart: LineChart, width: float) -> tuple[Markup, float]:
    """Return the names in rows above the plot, and the pixels that they take."""
    parts, x, y = [], 0.0, 34.0
    if chart.ranked:
        parts.append(words(0, y, chart.ranked + ":", "soft"))
        y += 20
    for one in chart.series:
        text = shorten(_label(one), width - 30, FONT_PX)
        room = 28 + min(_wide(one), width - 30)
        if x and x + room > width:
            x, y = 0.0, y + 20
        strong = " strong" if one.strong else ""
        parts += [_swatch(one, x, y - 4), words(x + 28, y, text, f"f{one.tone}{strong}")]
        x += room + 14
    return join(parts), y - 12


def _marker_rows(chart: LineChart, left: float, right: float) -> tuple[list[int], int]:
    """Give each marker's label a row above the plot in which it touches no other."""
    scale = Scale(low=chart.x.low, high=chart.x.high, start=left, end=right, log=chart.x.log)
    rows: list[int] = []
    taken: list[list[tuple[float, float]]] = []
    for marker in chart.markers:
        start, end = _marker_span(marker, scale)
        free = [
            row
            for row, spans in enumerate(taken)
            if all(end + 10 < low or start - 10 > high for low, high in spans)
        ]
        if not free:
            taken.append([])
            free = [len(taken) - 1]
        taken[free[0]].append((start, end))
        rows.append(free[0])
    return rows, len(taken)


def _marker_span(marker: Marker, scale: Scale) -> tuple[float, float]:
    x, wide = scale.at(marker.x), text_width(marker.label, FONT_PX)
    start = x + 4 if x + 4 + wide <= scale.end + 12 else max(x - 4 - wide, 0)
    return start, start + wide


def _marker_y(chart: LineChart, frame: _Frame, row: int) -> float:
    """Return the baseline of the marker labels in a row, counted from the plot upwards."""
    return frame.top - (26 if chart.top else 6) - (row - 1) * _ROW_PX


def _markers(chart: LineChart, frame: _Frame, rows: Sequence[int], n_row: int) -> Markup:
    parts: list[Markup] = []
    for marker, row in zip(chart.markers, rows, strict=True):
        x = frame.x.at(marker.x)
        start, _ = _marker_span(marker, frame.x)
        parts.append(words(start, _marker_y(chart, frame, n_row - row), marker.label, "halo"))
        if marker.y is not None:
            y = frame.y.at(marker.y)
            parts.append(tag("circle", cx=x, cy=y, r=6.0, class_=f"ring f{marker.tone}"))
    return join(parts)
