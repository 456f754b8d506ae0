"""The plots of forecasts: decode speed by machine, and where a token's time goes."""

import math
from collections.abc import Sequence

from edgeroute.tools.forecast.records import Forecast, Range
from edgeroute.tools.profile.figures import Figure, Table
from edgeroute.tools.profile.plots import Axis
from edgeroute.tools.profile.plots_rows import RangeRow, StackRow, range_rows, stacked_rows
from edgeroute.tools.profile.scales import (
    figure,
    log_ticks,
    percent,
    seconds,
    size,
    ticks,
    top_of,
)
from edgeroute.tools.profile.view import View

_MAX_ROWS = 24
_TONES = {"FITS": 3, "PAGES": 1, "REFUSED": 0}


def forecast_figures(view: View) -> list[Figure]:
    """Return the plots of what machines would make of the model."""
    rows = [(name[:60], one) for name, one in list((view.forecasts or {}).items())[:_MAX_ROWS]]
    if not rows:
        return []
    found = [_speeds(rows)]
    split = [(name, one) for name, one in rows if _parts(one)]
    return found + ([_times(split)] if split else [])


def _known(value: Range | None) -> Range | None:
    """Return a range that can be drawn: finite, positive, in order."""
    if value is None or not 0 < value.low <= value.likely <= value.high < math.inf:
        return None
    return value


def _speeds(rows: Sequence[tuple[str, Forecast]]) -> Figure:
    found = [(name, one, _known(one.decode_tok_s)) for name, one in rows]
    shown = [(name, speed) for name, _, speed in found if speed is not None]
    low = min((speed.low for _, speed in shown), default=1.0)
    high = max((speed.high for _, speed in shown), default=1.0)
    log = high > 20 * low
    end = high * 1.05 if log else top_of(high, 5)
    start = low / 1.3 if log else 0.0
    marks = log_ticks(start, end) if log else ticks(0, end, 5)
    axis = Axis(label="decode, tokens per second" + (" (logarithmic)" if log else ""), low=start,
                high=end, log=log, ticks=[(value, figure(value)) for value in marks])  # fmt: skip
    drawn = [
        RangeRow(
            name=name,
            values=(speed.low, speed.likely, speed.high) if speed else None,
            text=f"{figure(speed.likely)} · {one.verdict}"
            if speed
            else f"{one.verdict}: needs {size(one.smallest_bytes)}",
            tone=_TONES[one.verdict],
        )
        for name, one, speed in found
    ]
    return Figure(
        key="forecasts",
        headline=_speed_headline(shown, len(rows)),
        about="Forecast decode speed by machine: the bar is the range it should lie in, the dot "
        "the likely value. FITS: all weights in memory; PAGES: weights come from storage as "
        "they are needed; REFUSED: not even the least budget is there.",
        draw=lambda width: range_rows(drawn, axis, width),
        table=_speed_table(rows),
    )


def _speed_headline(shown: Sequence[tuple[str, Range]], n_row: int) -> str:
    if not shown:
        return f"None of {n_row} machines would run it."
    slow = min(shown, key=lambda row: row[1].likely)
    fast = max(shown, key=lambda row: row[1].likely)
    if len(shown) == 1:
        return f"{fast[0]} would decode {figure(fast[1].likely)} tokens per second."
    return (
        f"{len(shown)} of {n_row} machines would run it, from {figure(slow[1].likely)} "
        f"({slow[0]}) to {figure(fast[1].likely)} tokens per second ({fast[0]})."
    )


def _speed_table(rows: Sequence[tuple[str, Forecast]]) -> Table:
    head = ("machine", "verdict", "budget", "least budget", "hits", "decode tok/s",
            "prefill tok/s", "first token", "energy a token", "read a token")  # fmt: skip
    return Table(
        head=head,
        rows=tuple(
            (
                name,
                one.verdict + (f" ({one.pages})" if one.pages else ""),
                size(one.budget_bytes),
                size(one.smallest_bytes),
                percent(one.hit_ratio.likely) if one.hit_ratio else "–",
                _range(one.decode_tok_s),
                _range(one.prefill_tok_s),
                seconds(one.ttft_s.likely) if one.ttft_s else "–",
                f"{figure(one.joules_token.likely)}\u00a0J" if one.joules_token else "–",
                size(one.read_bytes_token),
            )
            for name, one in rows
        ),
    )


def _range(value: Range | None) -> str:
    if value is None:
        return "–"
    return f"{figure(value.likely)} ({figure(value.low)} to {figure(value.high)})"


def _parts(one: Forecast) -> dict[str, float]:
    return {name[:40]: part for name, part in list(one.parts.items())[:8] if 0 < part < math.inf}


def _times(rows: Sequence[tuple[str, Forecast]]) -> Figure:
    names = list(dict.fromkeys(name for _, one in rows for name in _parts(one)))[:8]
    split = [(machine, [_parts(one).get(name, 0.0) for name in names]) for machine, one in rows]
    drawn = [
        StackRow(name=machine, parts=parts, text=seconds(sum(parts))) for machine, parts in split
    ]
    machine, parts = max(split, key=lambda row: max(row[1]) / sum(row[1]))
    most = max(range(len(names)), key=parts.__getitem__)
    return Figure(
        key="parts",
        headline=f"On {machine}, {percent(parts[most] / sum(parts))} of a token's time goes to "
        f"{names[most]}.",
        about="Where the time of one decoded token goes, as shares of the likely case; at the "
        "right the whole.",
        draw=lambda width: stacked_rows("share of a token's time", names, drawn, width),
        table=Table(
            head=("machine", *names, "whole"),
            rows=tuple((machine, *map(seconds, parts), seconds(sum(parts)))
                       for machine, parts in split),
        ),
    )  # fmt: skip
