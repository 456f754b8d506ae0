"""Bars, ranges, stacked rows and the triangle of a symmetric matrix, as SVG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgeroute.tools.profile.markup import Markup, join, number, tag
from edgeroute.tools.profile.plots import FONT_PX, Axis, Drawing, straight, words, x_labels
from edgeroute.tools.profile.scales import Scale, shorten, text_width
from edgeroute.tools.profile.style import N_HEAT

_ROW_PX = 34.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One bar: its place's name, its height, and what stands above it."""

    name: str
    value: float
    text: str
    tone: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BarChart:
    """Upright bars side by side; `divide` (after so many bars) has a line with a name."""

    label: str
    x_label: str
    bars: Sequence[Bar]
    divide: int | None = None
    divide_text: str = ""
    height: float = 220


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeRow:
    """A row's name, its low, likely and high value (None: there is none), and what is said."""

    name: str
    values: tuple[float, float, float] | None
    text: str
    tone: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StackRow:
    """A row's name, its parts in the order of the chart's names, and what is said of it."""

    name: str
    parts: Sequence[float]
    text: str


def bar_chart(chart: BarChart, width: float) -> Drawing:
    """Draw upright bars; names that would touch are left out."""
    top, left, right = 44.0 if chart.divide is None else 60.0, 4.0, width - 4
    bottom = top + chart.height
    high = max((bar.value for bar in chart.bars), default=0.0) or 1.0
    step = (right - left) / max(len(chart.bars), 1)
    scale = Scale(low=0, high=high, start=bottom, end=top)
    parts = [words(0, 12, chart.label, "soft")]
    ticks = []
    for index, bar in enumerate(chart.bars):
        x, y = left + index * step, scale.at(bar.value)
        box = {"x": x + step * 0.08, "y": y, "width": step * 0.84, "height": bottom - y}
        said = tag("title", f"{bar.name}: {bar.text}")
        parts.append(tag("g", said, tag("rect", **box, rx=1.5, class_=f"f{bar.tone}")))
        if bar.value and text_width(bar.text, 11) <= step * 1.05:
            parts.append(words(x + step / 2, y - 5, bar.text, "soft", "middle", px=11))
        ticks.append((index + 0.5, bar.name))
    axis = Axis(label="", low=0, high=len(chart.bars), ticks=ticks)
    places = Scale(low=0, high=max(len(chart.bars), 1), start=left, end=right)
    parts.append(straight(left, bottom, right, bottom, "axis"))
    parts.append(x_labels(axis, places, bottom + 17))
    parts.append(words((left + right) / 2, bottom + 36, chart.x_label, "soft", "middle"))
    if chart.divide is not None:
        parts.append(_divider(chart, places.at(chart.divide), bottom, width))
    return Drawing(width=width, height=bottom + 42, body=join(parts))


def _divider(chart: BarChart, x: float, bottom: float, width: float) -> Markup:
    after = x + 6 + text_width(chart.divide_text, FONT_PX) <= width
    name = words(x + (4 if after else -4), 34, chart.divide_text, "", None if after else "end")
    return join((straight(x, 26, x, bottom, "rule"), name))


def range_rows(rows: Sequence[RangeRow], axis: Axis, width: float) -> Drawing:
    """Draw one bar from low to high a row, a dot where it is likely, and the text beside it."""
    left, right, above = _row_room([row.name for row in rows], width)
    said = max((text_width(row.text, FONT_PX) for row in rows if row.values), default=0.0)
    right = max(right - said * 1.1 - 12, left + 60)
    scale = Scale(low=axis.low, high=axis.high, start=left, end=right, log=axis.log)
    top = 30.0
    pitch = _ROW_PX + (14 if above else 0)
    bottom = top + pitch * len(rows)
    parts = [words(0, 12, axis.label, "soft")]
    for value, _ in axis.ticks:
        parts.append(straight(scale.at(value), top - 6, scale.at(value), bottom, "grid"))
    for index, row in enumerate(rows):
        y = top + pitch * index + pitch / 2 + (7 if above else 0)
        parts.append(_row_name(row.name, y, left, above, width))
        if row.values is None:
            parts.append(words(left + 2, y + 4, row.text, "soft halo"))
            continue
        low, likely, high = (scale.at(value) for value in row.values)
        box = tag("rect", x=low, y=y - 5, width=max(high - low, 2.0), height=10.0, rx=5.0,
                  class_=f"f{row.tone}", opacity="0.3")  # fmt: skip
        dot = tag("circle", cx=likely, cy=y, r=5.0, class_=f"f{row.tone}")
        parts.append(tag("g", tag("title", f"{row.name}: {row.text}"), box, dot))
        parts.append(words(high + 8, y + 4, row.text, f"f{row.tone} strong halo"))
    parts.append(straight(left, bottom, right, bottom, "axis"))
    parts.append(x_labels(axis, scale, bottom + 17))
    return Drawing(width=width, height=bottom + 24, body=join(parts))


def stacked_rows(
    label: str, names: Sequence[str], rows: Sequence[StackRow], width: float
) -> Drawing:
    """Draw every row's parts as shares of the whole row, with the total beside it."""
    left, right, above = _row_room([row.name for row in rows], width)
    said = max((text_width(row.text, FONT_PX) for row in rows), default=0.0)
    right = max(right - said - 8, left + 60)
    keys, top = _row_keys(names, width)
    pitch = _ROW_PX - 4 + (14 if above else 0)
    parts = [words(0, 12, label, "soft"), keys]
    for index, row in enumerate(rows):
        y = top + pitch * index + pitch / 2 + (7 if above else 0)
        parts.append(_row_name(row.name, y, left, above, width))
        parts.append(_stack(row, names, y, (left, right)))
        parts.append(words(right + 8, y + 4, row.text, "soft"))
    return Drawing(width=width, height=top + pitch * len(rows) + 6, body=join(parts))


def _stack(row: StackRow, names: Sequence[str], y: float, room: tuple[float, float]) -> Markup:
    total, x = sum(row.parts) or 1.0, room[0]
    boxes = []
    for index, part in enumerate(row.parts):
        wide = (room[1] - room[0]) * part / total
        said = tag("title", f"{row.name}: {names[index]} {part / total * 100:.0f}\u00a0%")
        box = tag("rect", x=x, y=y - 8, width=max(wide - 1.5, 0.5), height=16.0,
                  class_=f"f{_tone(index)}")  # fmt: skip
        boxes.append(tag("g", said, box))
        x += wide
    return join(boxes)


def _tone(index: int) -> int:
    """Greys for the many parts beyond what colours can keep apart."""
    return index + 1 if index < 5 else 0


def _row_keys(names: Sequence[str], width: float) -> tuple[Markup, float]:
    parts, x, y = [], 0.0, 34.0
    for index, name in enumerate(names):
        room = 18 + text_width(name, FONT_PX)
        if x and x + room > width:
            x, y = 0.0, y + 20
        box = tag("rect", x=x, y=y - 10, width=12.0, height=12.0, class_=f"f{_tone(index)}")
        parts += [box, words(x + 18, y, name)]
        x += room + 14
    return join(parts), y + 10


def _row_room(names: Sequence[str], width: float) -> tuple[float, float, bool]:
    """Return where bars begin and end, and whether their names stand above them."""
    widest = max((text_width(name, FONT_PX) for name in names), default=0.0) + 12
    above = widest > width * 0.4
    return (2.0 if above else widest), width - 4, above


def _row_name(name: str, y: float, left: float, above: bool, width: float) -> Markup:
    if above:
        return words(0, y - 13, shorten(name, width, FONT_PX))
    return words(left - 10, y + 4, name, "", "end")


def triangle(
    label: str, names: Sequence[str], values: Sequence[Sequence[float]], width: float
) -> Drawing:
    """Draw the lower half of a symmetric matrix of ratios; the names stand on its diagonal.

    The scale goes from 0 to 1; a row's name is a column's too.
    """
    room = max((text_width(name, FONT_PX) for name in names[1:]), default=0.0)
    room = min(max(room, text_width(names[0], FONT_PX) if names else 0.0) + 10, width * 0.4)
    cell = min((width - room) / max(len(names) - 1, 1), 56.0)
    high = min(cell, 40.0)
    parts, top = [words(0, 12, label, "soft")], 24.0
    for i, name in enumerate(names):
        y = top + (i - 1) * high if i else top - high
        for j in range(i):
            parts.append(_cell((j * cell, y + high, cell, high), values[i][j], (name, names[j])))
        text = shorten(name, room - 8, FONT_PX)
        parts.append(words(i * cell + 6, y + high + high / 2 + 4, text))
    return Drawing(width=width, height=top + high * len(names) + 4, body=join(parts))


def _cell(box: tuple[float, float, float, float], value: float, names: tuple[str, str]) -> Markup:
    x, y, wide, high = box
    if not math.isfinite(value):
        return Markup()
    step = min(max(int(value * N_HEAT), 0), N_HEAT - 1)
    text = f"{min(max(value, -1.0), 9.99) * 100:.0f}"
    shape = tag("path", d=f"M{number(x)} {number(y)}h{number(wide - 1.5)}v{number(high - 1.5)}"
                f"h{number(1.5 - wide)}z", class_=f"h{step}")  # fmt: skip
    said = tag("title", f"{names[0]} and {names[1]}: {text}\u00a0%")
    if wide < 24:
        return tag("g", said, shape)
    inner = tag("text", text, x=x + wide / 2 - 0.75, y=y + high / 2 + 4, text_anchor="middle",
                font_size=FONT_PX, class_=f"k{step}")  # fmt: skip
    return tag("g", said, shape, inner)
