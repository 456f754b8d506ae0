"""What a calibration of step routing found: a table for the terminal, a page for a browser.

The page is one file without scripts and without anything from elsewhere; every text on it is
escaped.
"""

import html
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from edgeroute.skippers.step_price import predicted_s
from edgeroute.steps_file import Point, StepsFile

if TYPE_CHECKING:
    from rich.table import Table

CONTROL: Final = "random"
"""Name of the policy that the others are compared with; it is never chosen."""

_WIDTH, _HEIGHT = 620, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 150, 24, 48
_STYLE: Final = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 84rem; padding: 0 1rem;
       color: #1b1f24; background: #fff }
h1 { font-size: 1.4rem } h2 { font-size: 1.05rem }
.verdict { border-left: 4px solid #0a7; padding: .3rem .8rem; background: #f2faf7 }
.panels { display: flex; flex-wrap: wrap; gap: 1.5rem }
table { border-collapse: collapse } td, th { padding: .25rem .7rem; text-align: right }
td:first-child, th:first-child { text-align: left } tr { border-bottom: 1px solid #d8dde3 }
tr.chosen { font-weight: 600; background: #f2faf7 } code { font-size: .95em }
svg text { font: 11px system-ui, sans-serif; fill: #1b1f24 } .axis { stroke: #9aa3ad }
.grid { stroke: #e6e9ed } .aim { stroke: #0a7; stroke-dasharray: 5 4 }
.whisker { stroke: #9aa3ad } .routed { fill: #3467c8 } .alone { fill: #d9822b }
.control { fill: #fff; stroke: #7b8794; stroke-width: 1.5 }
.chosen-ring { fill: none; stroke: #0a7; stroke-width: 2 }
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepsReport:
    """What a calibration found.

    Attributes:
        path: of the steps file.
        small, large: names of the models.
        file: what the file holds.
        seconds: that the calibration took.
        notes: what the reader must know: policies left out, and why.
    """

    path: Path
    small: str
    large: str
    file: StepsFile
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def routing_loses(self) -> bool:
        """Whether the large model alone is as quick as the quickest policy that is good enough."""
        chosen, large = self._chosen, self.file.point("large")
        return chosen is not None and large is not None and chosen.seconds >= large.seconds

    @property
    def verdict(self) -> str:
        """Say what to do on this machine."""
        file, chosen, large = self.file, self._chosen, self.file.point("large")
        wanted = file.target * file.large_accuracy
        aim = f"{file.target:g} of the large model's accuracy ({wanted:.3f})"
        if chosen is None or large is None:
            return f"no policy reaches {aim}: steps stay off"
        paces = f"{chosen.seconds:.2f} s an answer, the large model alone {large.seconds:.2f} s"
        if self.routing_loses:
            return (f"routing loses on this machine: the quickest policy that reaches {aim} is "
                    f"steps={chosen.spec!r} with {paces}")  # fmt: skip
        return f"quickest that reaches {aim}: steps={chosen.spec!r}, {paces}"

    @property
    def _chosen(self) -> Point | None:
        return None if self.file.chosen is None else self.file.point(self.file.chosen)

    def predicted_s(self, point: Point) -> float | None:
        """Return the seconds of an answer as the costs of the models' passes predict them.

        None where those were not measured.
        """
        small, large = self.file.costs["small"], self.file.costs["large"]
        if not (small.known and large.known):
            return None
        return predicted_s(point.workload, small, large)

    def to_dict(self) -> dict[str, object]:
        """Return all figures as plain JSON types."""
        file = self.file
        points = [
            {
                "spec": point.spec, "n": point.n, "accuracy": round(point.accuracy, 4),
                "low": round(point.low, 4), "high": round(point.high, 4),
                "large_share": round(point.large_share, 4),
                "predicted_s": self.predicted_s(point),
                "seconds": round(point.seconds, 4),
            }
            for point in file.points
        ]  # fmt: skip
        return {
            "small": self.small, "large": self.large, "path": str(self.path), "points": points,
            "target": file.target, "chosen": file.chosen, "verdict": self.verdict,
            "routing_loses": self.routing_loses, "seconds": round(self.seconds, 1),
            "notes": list(self.notes),
        }  # fmt: skip


# the terminal


def to_table(report: StepsReport) -> "Table":
    """Draw the policies as a table for rich, in the order of their seconds."""
    from rich.table import Table

    n = max(point.n for point in report.file.points)
    title = (f"{report.small} with {report.large}: {n} tasks, share of tokens by the large model, "
             "seconds of an answer")  # fmt: skip
    table = Table(title=title, show_edge=False)
    for name in _HEADS:
        table.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
    for point in _in_order(report):
        table.add_row(*_cells(report, point), style=_row_style(report, point))
    return table


_HEADS: Final = ("policy", "accuracy", "95 %", "large", "predicted", "measured")


def _in_order(report: StepsReport) -> list[Point]:
    return sorted(report.file.points, key=lambda point: (point.seconds, point.spec))


def _cells(report: StepsReport, point: Point) -> tuple[str, ...]:
    predicted = report.predicted_s(point)
    return (
        point.spec, f"{point.accuracy:.3f}", f"{point.low:.2f} to {point.high:.2f}",
        f"{point.large_share:.0%}", "-" if predicted is None else f"{predicted:.2f}",
        f"{point.seconds:.2f}",
    )  # fmt: skip


def _row_style(report: StepsReport, point: Point) -> str | None:
    if point.spec == report.file.chosen:
        return "bold green"
    return "dim" if is_control(point.spec) else None


def is_control(spec: str) -> bool:
    """Tell whether a policy is there to be beaten."""
    return spec.split(":")[0] == CONTROL


# the page


def to_html(report: StepsReport) -> str:
    """Draw the same as a page, with accuracy over seconds and over the large model's share."""
    title = html.escape(f"Steps: {report.small} with {report.large}")
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in report.notes)
    by_time = _scatter(report, "seconds of an answer, measured", lambda point: point.seconds)
    by_share = _scatter(report, "share of tokens by the large model",
                        lambda point: point.large_share)  # fmt: skip
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; style-src 'unsafe-inline'; img-src 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{title}</h1>
<p class="verdict">{html.escape(report.verdict)}</p>
<div class="panels">
<section><h2>Accuracy over time</h2>
{by_time}
</section>
<section><h2>Accuracy over the large model's share</h2>
{by_share}
</section>
</div>
<h2>Policies</h2>
{_html_table(report)}
<p>Large: share of tokens by the large model. Predicted and measured: seconds of an answer, the
former from what passes of each model cost. Bars are 95 % intervals (Wilson). Hollow points are
random routing, the control. The dashed line is the accuracy that was asked for. Measured on
{html.escape(report.file.date)}.</p>
<ul>{notes}</ul>
</body>
</html>
"""


def _html_table(report: StepsReport) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in _HEADS)
    rows = []
    for point in _in_order(report):
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(report, point))
        kind = ' class="chosen"' if point.spec == report.file.chosen else ""
        rows.append(f"<tr{kind}>{cells}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scale:
    """Turns figures into places of a picture; accuracy goes from 0 to 1."""

    most_x: float

    def x(self, value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * value / self.most_x

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * value


def _scatter(report: StepsReport, label: str, figure: Callable[[Point], float]) -> str:
    points = _in_order(report)
    scale = _Scale(most_x=nice_end(max(figure(point) for point in points)))
    file = report.file
    aim = scale.y(file.target * file.large_accuracy)
    parts = [_axes(scale, label), _line("aim", (scale.x(0), aim), (scale.x(scale.most_x), aim))]
    labels = _spread([scale.y(point.accuracy) for point in points])
    for point, label_y in zip(points, labels, strict=True):
        parts.append(_mark(report, point, (scale.x(figure(point)), label_y), scale))
    name = html.escape(f"accuracy over {label}", quote=True)
    return (f'<svg role="img" aria-label="{name}" width="{_WIDTH}" height="{_HEIGHT}" '
            f'viewBox="0 0 {_WIDTH} {_HEIGHT}" xmlns="http://www.w3.org/2000/svg">'
            f"{''.join(parts)}</svg>")  # fmt: skip


def _mark(report: StepsReport, point: Point, at: tuple[float, float], scale: _Scale) -> str:
    """Draw a policy: its interval, its point, and its name where no other name is."""
    (x, label_y), y = at, scale.y(point.accuracy)
    alone = point.spec in ("small", "large")
    kind = "control" if is_control(point.spec) else "alone" if alone else "routed"
    ring = f'<circle class="chosen-ring" cx="{x:.1f}" cy="{y:.1f}" r="8"/>'
    cells = html.escape(", ".join(_cells(report, point)))
    leader = _line("grid", (x, y), (x + 10, label_y))
    return (f"<g><title>{cells}</title>{leader}"
            f"{_line('whisker', (x, scale.y(point.low)), (x, scale.y(point.high)))}"
            f"{ring if point.spec == report.file.chosen else ''}"
            f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'
            f'<text x="{x + 12:.1f}" y="{label_y + 4:.1f}">{html.escape(point.spec)}</text></g>'
            )  # fmt: skip


def _axes(scale: _Scale, label: str) -> str:
    left, right = scale.x(0), scale.x(scale.most_x)
    parts = []
    for i in range(6):
        x, y = scale.x(scale.most_x * i / 5), scale.y(i / 5)
        parts.append(_line("grid", (left, y), (right, y)))
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{i / 5:.1f}</text>')
        parts.append(f'<text x="{x:.1f}" y="{scale.y(0) + 18:.1f}" text-anchor="middle">'
                     f"{scale.most_x * i / 5:g}</text>")  # fmt: skip
    parts.append(_line("axis", (left, scale.y(0)), (right, scale.y(0))))
    parts.append(_line("axis", (left, scale.y(0)), (left, scale.y(1))))
    middle = (left + right) / 2
    parts.append(f'<text x="{middle:.1f}" y="{_HEIGHT - 8}" text-anchor="middle">'
                 f"{html.escape(label)}</text>")  # fmt: skip
    parts.append(f'<text x="{left - 8}" y="14" text-anchor="end">accuracy</text>')
    return "".join(parts)


def _line(kind: str, start: tuple[float, float], end: tuple[float, float]) -> str:
    return (f'<line class="{kind}" x1="{start[0]:.1f}" y1="{start[1]:.1f}" '
            f'x2="{end[0]:.1f}" y2="{end[1]:.1f}"/>')  # fmt: skip


def _spread(places: Sequence[float], least: float = 12.0) -> list[float]:
    """Move names apart, in the order of their points, so that none covers another."""
    found = list(places)
    order = sorted(range(len(places)), key=lambda i: places[i])
    for above, below in itertools.pairwise(order):
        found[below] = max(found[below], found[above] + least)
    over = max(0.0, max(found) - (_HEIGHT - _BOTTOM)) if found else 0.0
    return [place - over for place in found]


def nice_end(value: float) -> float:
    """Return the end of an axis that shows `value`: 1, 2 or 5 times a power of ten."""
    end = 1.0
    while end > value > 0:
        end /= 10
    while end < value:
        for factor in (1, 2, 5, 10):
            if end * factor >= value:
                return end * factor
        end *= 10
    return end
