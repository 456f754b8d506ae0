"""Alternating runs: A B A B ..., each with what the rest of the machine did meanwhile.

A speed alone says little on a machine that others use too; a ratio of medians over
alternating runs, with its spread, says more; and runs that others disturbed say so.
"""

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import psutil

from edgeroute.runtime.errors import UsageError

NOISY_CORES = 0.2
"""Cores that others may keep busy before a run counts as disturbed."""

Runner = Callable[[], float]
Progress = Callable[[str], None]


class Probe(Protocol):
    """Measures how many cores others kept busy."""

    def start(self) -> None:
        """Begin an interval."""

    def stop(self) -> float:
        """Return the mean number of cores that others used since `start`."""


class OthersProbe:
    """Counts as others all but this process and everything it started."""

    def __init__(self) -> None:
        self._at, self._busy_s = 0.0, 0.0

    def start(self) -> None:
        self._at, self._busy_s = time.monotonic(), _others_s()

    def stop(self) -> float:
        busy_s, wall_s = _others_s() - self._busy_s, time.monotonic() - self._at
        return max(0.0, busy_s) / wall_s if wall_s > 0 else 0.0


def _others_s() -> float:
    """Core seconds that were used on this machine, less our own and our descendants'."""
    times = psutil.cpu_times()
    used = times.user + times.system + getattr(times, "irq", 0.0) + getattr(times, "softirq", 0.0)
    used += getattr(times, "nice", 0.0)
    own = os.times()
    mine = own.user + own.system + own.children_user + own.children_system
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # one that ended meanwhile is in children_user
            spent = child.cpu_times()
            mine += spent.user + spent.system + spent.children_user + spent.children_system
    return float(used - mine)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How often to run, and how long to rest before each run."""

    reps: int = 5
    warmup: int = 1
    pause_s: float = 0.2

    def __post_init__(self) -> None:
        if self.reps < 1 or self.warmup < 0:
            raise UsageError(f"reps must be at least 1 and warmup 0, got {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """What one runner measured, run by run, and how many cores others used meanwhile."""

    values: tuple[float, ...]
    others: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile; the value itself where there is only one."""
        if len(self.values) < 2:
            return self.values[0], self.values[0]
        q = statistics.quantiles(self.values, n=4, method="inclusive")
        return q[0], q[2]

    @property
    def n_noisy(self) -> int:
        """Runs during which others used more than NOISY_CORES."""
        return sum(other > NOISY_CORES for other in self.others)

    def to_dict(self) -> dict[str, object]:
        """Return all figures as plain JSON types."""
        low, high = self.quartiles
        return {
            "median": round(self.median, 6),
            "q1": round(low, 6),
            "q3": round(high, 6),
            "iqr": round(high - low, 6),
            "values": [round(value, 6) for value in self.values],
            "others_cores": [round(other, 3) for other in self.others],
            "n_noisy": self.n_noisy,
        }


def alternate(
    runners: Mapping[str, Runner], plan: Plan, progress: Progress, *,
    probe: Probe | None = None, sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Series]:  # fmt: skip
    """Run every runner in turn, `plan.reps` rounds after `plan.warmup` uncounted ones.

    The order turns around each round (A B, B A, ...), so that a drift of the machine, such as
    heat, falls on all alike. A runner returns what it measured.
    """
    probe = probe or OthersProbe()
    values: dict[str, list[float]] = {name: [] for name in runners}
    others: dict[str, list[float]] = {name: [] for name in runners}
    for round_ in range(-plan.warmup, plan.reps):
        names = list(runners) if round_ % 2 == 0 else list(runners)[::-1]
        shown = []
        for name in names:
            sleep(plan.pause_s)
            probe.start()
            value = runners[name]()
            other = probe.stop()
            noisy = "!" if other > NOISY_CORES else ""
            shown.append(f"{name} {value:.4g}{noisy}")
            if round_ >= 0:
                values[name].append(value)
                others[name].append(other)
        label = f"run {round_ + 1}/{plan.reps}" if round_ >= 0 else "warm-up"
        progress(f"{label}: {', '.join(shown)}")
    return {
        name: Series(values=tuple(values[name]), others=tuple(others[name])) for name in runners
    }


def ratio(ours: Series, theirs: Series) -> float:
    """Ratio of the medians."""
    return ours.median / theirs.median if theirs.median else float("inf")
