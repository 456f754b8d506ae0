"""What answers on this machine had of what was forecast for them: it corrects the next forecast.

A calibration times single products with warm caches, and is remembered for a month. What a model
really does with them is seen from its first answer on, and so is an hour in which the machine is
slower than it was then.
"""

import dataclasses
import math
import statistics
import time
from pathlib import Path
from typing import Any, Final, NamedTuple

from edgeroute.config import RunParams
from edgeroute.runtime import machine
from edgeroute.runtime.cache_file import cache_path, read_entries, write_entries
from edgeroute.tools.forecast.records import Range

LAST: Final = 5
"""Answers of a model that count."""
VALID_S: Final = 30 * 24 * 3600
ALIKE: Final = 1.5
"""By how much a forecast may differ from one that an answer was set beside: beyond, the machine was
measured anew, or other settings ask for something else."""
_FILE: Final = "answers.json"
_VERSION: Final = 1
_MOST_ENTRIES: Final = 200
_MOST_BYTES: Final = 1 << 16


class Seen(NamedTuple):
    """What answers had of what had been forecast: the median ratio, and of how many."""

    ratio: float
    n: int


def note(model: Path, params: RunParams, likely: float, had: float) -> None:
    """Remember what an answer had, beside its forecast without any correction; tokens a second."""
    if not (_is_speed(likely) and _is_speed(had)):
        return
    key = _key(model, params)
    entries = [[key, time.time(), likely, had], *_entries()]
    write_entries(cache_path(_FILE), _VERSION, entries[:_MOST_ENTRIES])


def seen(model: Path, params: RunParams, likely: float) -> Seen | None:
    """Return what answers of a model had of forecasts like this one; None without any."""
    key, now = _key(model, params), time.time()
    ratios = [
        had / said for each, at, said, had in _entries()
        if each == key and now - VALID_S < at <= now and 1 / ALIKE < said / likely < ALIKE
    ]  # fmt: skip
    last = ratios[:LAST]
    return Seen(statistics.median(last), len(last)) if last else None


def corrected(said: Range, found: Seen | None) -> Range:
    """Return a forecast as answers have corrected it."""
    if found is None:
        return said
    return Range(**{name: found.ratio * each for name, each in dataclasses.asdict(said).items()})


def _key(model: Path, params: RunParams) -> str:
    try:
        size = model.stat().st_size
    except OSError:
        size = 0
    return f"{model.name}|{size}|{params.threads or machine.usable_cores()}"


def _entries() -> list[Any]:
    """Read what is remembered, the latest first; what is not of its form is left out."""
    return [each for each in read_entries(cache_path(_FILE), _VERSION, _MOST_BYTES)
            if _is_entry(each)]  # fmt: skip


def _is_entry(each: object) -> bool:
    if not isinstance(each, list) or len(each) != 4 or not isinstance(each[0], str):
        return False
    return all(isinstance(n, int | float) and _is_speed(n) for n in each[1:])


def _is_speed(number: float) -> bool:
    return math.isfinite(number) and number > 0
