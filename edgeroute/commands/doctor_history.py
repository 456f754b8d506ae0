"""What this machine was measured to reach before: one JSON line a time, in the user's cache."""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from edgeroute import __version__
from edgeroute.runtime.cache_file import cache_path, replace_text

NAME: Final = "doctor.jsonl"
MOST_ENTRIES: Final = 100
LEAST_ENTRIES: Final = 3
"""Fewer earlier figures say nothing about what is usual."""
VALID_S: Final = 400 * 24 * 3600
_MAX_BYTES: Final = 256 << 10
_MAX_FIGURES: Final = 32
_MAX_CHARS: Final = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Figures by name, in bytes per second, and what they hold for.

    A figure's name says all that it depends on: threads, disk, reads at once.
    """

    when: int
    version: str
    power_mode: str | None
    figures: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Usual:
    """The median of earlier figures of one name, how many, and in which power mode (or any).

    `low` is what a fifth of them lay below: some disks vary more than others.
    """

    value: float
    low: float
    n: int
    power_mode: str | None = None


def read_history(path: Path | None = None) -> list[Entry]:
    """Return the entries that can be believed, oldest first; an unreadable file has none."""
    try:
        with (path or cache_path(NAME)).open("rb") as file:
            lines = file.read(_MAX_BYTES).decode("ascii", errors="replace").splitlines()
    except OSError:
        return []  # the first time, or not ours: measured anew
    found = [entry for line in lines if (entry := _entry(line)) is not None]
    return sorted(found, key=lambda entry: entry.when)[-MOST_ENTRIES:]


def add_entry(
    figures: Mapping[str, float], power_mode: str | None, path: Path | None = None
) -> None:
    """Append what was measured just now; the oldest entries make room."""
    where = path or cache_path(NAME)
    fresh = Entry(when=int(time.time()), version=__version__, power_mode=power_mode,
                  figures=dict(figures))  # fmt: skip
    entries = [*read_history(where), fresh][-MOST_ENTRIES:]
    replace_text(where, "".join(json.dumps(asdict(entry)) + "\n" for entry in entries))


def usual(history: Sequence[Entry], name: str, mode: str | None = None) -> Usual | None:
    """Return the median of a figure, of one power mode if given; None where too few are known."""
    values = [
        entry.figures[name]
        for entry in history
        if name in entry.figures and (mode is None or entry.power_mode == mode)
    ]
    if len(values) < LEAST_ENTRIES:
        return None
    low = statistics.quantiles(values, n=5, method="inclusive")[0]
    return Usual(value=statistics.median(values), low=low, n=len(values), power_mode=mode)


def best_mode(history: Sequence[Entry], name: str) -> Usual | None:
    """Return the power mode in which a figure is usually highest."""
    modes = sorted({entry.power_mode for entry in history if entry.power_mode is not None})
    found = [each for mode in modes if (each := usual(history, name, mode)) is not None]
    return max(found, key=lambda each: each.value, default=None)


def _entry(line: str) -> Entry | None:
    """Take a line as far as it can be believed."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found.keys() != set(Entry.__dataclass_fields__):
        return None
    when, version, mode = found["when"], found["version"], found["power_mode"]
    young = isinstance(when, int) and not isinstance(when, bool)
    young = young and 0 <= time.time() - when < VALID_S
    if not young or not _text(version) or not (mode is None or _text(mode)):
        return None
    figures = found["figures"]
    if not isinstance(figures, dict) or not 0 < len(figures) <= _MAX_FIGURES:
        return None
    if not all(_text(name) and _speed(value) for name, value in figures.items()):
        return None
    return Entry(when=when, version=version, power_mode=mode, figures=figures)


def _text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= _MAX_CHARS and value.isprintable()


def _speed(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 < value < 1e15  # neither is true of a NaN
