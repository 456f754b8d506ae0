"""Where a value lies on an axis, which values get a tick, and how numbers are printed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgeroute.runtime.units import KIB, format_bytes

NBSP = "\u00a0"
"""Holds a number and its unit together."""
_NARROW = frozenset("iIjl.,:;'|!()[]{}tfr\u00a0 ")
_BROAD = frozenset("mwMW@%&")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Maps `low` to `high` onto the pixels `start` to `end`; values beyond go to the ends."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Return the pixel of `value`."""
        low, high = self._of(self.low), self._of(self.high)
        if high <= low:
            return (self.start + self.end) / 2
        share = (self._of(value) - low) / (high - low)
        held = min(share, 1.0) if share > 0 else 0.0  # NaN, too, goes to the start
        return self.start + held * (self.end - self.start)

    def _of(self, value: float) -> float:
        return math.log10(max(value, 1e-12)) if self.log else value


def ticks(low: float, high: float, n: int) -> tuple[float, ...]:
    """Return about `n` round values (steps of 1, 2 or 5) from `low` to `high`."""
    if not high > low:
        return (low,)
    step = _round_step((high - low) / max(n, 1))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(i * step for i in range(first, last + 1))


def log_ticks(low: float, high: float) -> tuple[float, ...]:
    """Return round values for a logarithmic axis: 1, 2, 5 a decade, or decades where many."""
    if not 0 < low < high:
        return (low,)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if last - first <= 3 else (1,)
    found = [step * 10.0**power for power in range(first, last + 1) for step in steps]
    return tuple(value for value in found if low * 0.999 <= value <= high * 1.001)


def byte_ticks(high: float, n: int) -> tuple[tuple[float, str], ...]:
    """Return about `n` round numbers of a binary unit from 0 to `high` bytes, with labels."""
    unit, name = 1.0, "B"
    for bigger in ("KiB", "MiB", "GiB", "TiB"):
        if high / unit < KIB:
            break
        unit, name = unit * KIB, bigger
    return tuple(
        (value * unit, f"{value:g}{NBSP}{name}" if value else "0")
        for value in ticks(0, high / unit, n)
    )


def top_of(high: float, n: int) -> float:
    """Return the round value at or above `high` that an axis of about `n` ticks ends at."""
    if not high > 0:
        return 1.0
    step = _round_step(high / max(n, 1))
    return math.ceil(high / step - 1e-9) * step


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor for factor in (1, 2, 5, 10) if factor * power >= step * 0.999) * power


def percent(ratio: float, digits: int = 0) -> str:
    """Print a ratio, 0 to 1, as `83 %`."""
    if not math.isfinite(ratio):
        return "–"
    if 0 < ratio < 0.00995:
        digits = max(digits, 1)
    return f"{min(max(ratio * 100, -9999.0), 9999.0):.{digits}f}{NBSP}%"


def figure(value: float) -> str:
    """Print a number with three significant digits, or whole with commas: `0.0123`, `6,144`."""
    if not math.isfinite(value):
        return "–"
    if abs(value) >= 1e15:
        return f"{value:.3g}"
    if abs(value) >= 100 or value == round(value):
        return f"{value:,.0f}"
    if abs(value) < 1e-4:
        return f"{value:.2g}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}".rstrip("0").rstrip(".")


def score(value: float, digits: int = 3) -> str:
    """Print a number with so many decimals."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


def seconds(value: float) -> str:
    """Print a duration in the unit that suits it: `1.2 ms`, `3.4 s`."""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if abs(value) * factor >= 1 or unit == "µs":
            return f"{figure(value * factor)}{NBSP}{unit}"
    raise AssertionError("the last unit takes every value")


def size(n_bytes: float) -> str:
    """Print a byte count as everywhere in edgeroute, held together."""
    if not math.isfinite(n_bytes):
        return "–"
    return format_bytes(n_bytes).replace(" ", NBSP)


def text_width(text: str, font_px: float) -> float:
    """Estimate how wide a broad sans-serif font prints `text`, in pixels."""
    em = 0.0
    for letter in text:
        if letter in _NARROW:
            em += 0.4
        elif letter in _BROAD:
            em += 0.97
        elif ord(letter) > 0x2E7F:
            em += 1.0
        else:
            em += 0.71 if letter.isupper() else 0.625
    return em * font_px


def shorten(text: str, width: float, font_px: float) -> str:
    """Cut `text` to what fits into `width` pixels, with an ellipsis where cut."""
    text = text[:200]
    if text_width(text, font_px) <= width:
        return text
    while text and text_width(text + "…", font_px) > width:
        text = text[:-1]
    return text.rstrip() + "…"


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move positions apart until `gap` lies between neighbours, inside `low` to `high`.

    Where they cannot all have `gap` they get what there is. The order is kept.
    """
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    gap = min(gap, (high - low) / max(len(wanted) - 1, 1))
    placed: list[float] = []
    for rank, index in enumerate(order):
        floor = placed[-1] + gap if placed else low
        placed.append(min(max(wanted[index], floor), high - gap * (len(order) - 1 - rank)))
    for rank in range(len(order) - 2, -1, -1):  # close the room that pushing down has left
        mean = wanted[order[rank]]
        placed[rank] = max(min(placed[rank], placed[rank + 1] - gap), low, min(mean, placed[rank]))
    found = [0.0] * len(wanted)
    for rank, index in enumerate(order):
        found[index] = placed[rank]
    return found
