"""What a benchmark says: a table for people, and one JSON object, last."""

import datetime
import importlib.metadata
import json
import math
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from edgeroute.runtime import machine
from edgeroute.runtime.units import format_bytes
from edgeroute.tools.bench.pairs import Plan, Series, ratio


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchParams:
    """What every benchmark is told.

    Attributes:
        name: the model as the user named it.
        threads: compute threads of both engines; the contention benchmark tries several.
        tokens: tokens to decode in one run.
        window_s: seconds of one contention run.
    """

    path: Path
    name: str
    threads: int
    reps: int = 5
    tokens: int = 128
    warmup: int = 1
    pause_s: float = 0.2
    window_s: float = 4.0

    @property
    def plan(self) -> Plan:
        """How to alternate."""
        return Plan(reps=self.reps, warmup=self.warmup, pause_s=self.pause_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Criterion:
    """One demand: a value that must be at least (or at most) a limit."""

    what: str
    value: float
    limit: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    def to_dict(self) -> dict[str, object]:
        return {
            "what": self.what,
            "value": plain(self.value),
            "limit": self.limit,
            "sense": "<=" if self.at_most else ">=",
            "met": self.met,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A finished benchmark."""

    bench: str
    params: BenchParams
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    results: Sequence[dict[str, object]]
    criteria: tuple[Criterion, ...] = ()
    notes: tuple[str, ...] = ()
    timed: bool = True
    machine: dict[str, object] = field(default_factory=lambda: machine_state())

    @property
    def met(self) -> bool:
        """Whether every criterion holds."""
        return all(criterion.met for criterion in self.criteria)

    def to_dict(self) -> dict[str, object]:
        params = self.params
        return {
            "bench": self.bench,
            "model": params.name,
            "threads": params.threads,
            "reps": params.reps,
            "warmup": params.warmup,
            "results": list(self.results),
            "criteria": [criterion.to_dict() for criterion in self.criteria],
            "notes": list(self.notes),
            "machine": self.machine,
        }


def machine_state() -> dict[str, object]:
    """Describe the machine as it is now, for the record."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": machine.usable_cores(),
        "load_average": [round(load, 2) for load in psutil.getloadavg()],
        "memory_available_bytes": machine.memory().available_bytes,
        "python": platform.python_version(),
        "llama_cpp_python": importlib.metadata.version("llama-cpp-python"),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
    }


def _cpu_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def pair_result(
    what: dict[str, object], unit: str, ours: Series, peer: Series
) -> dict[str, object]:
    """Return the JSON of one pair: both series and the ratio of their medians."""
    return {
        **what,
        "unit": unit,
        "edgeroute": ours.to_dict(),
        "llama_cpp": peer.to_dict(),
        "ratio": plain(ratio(ours, peer)),
        "n_noisy": ours.n_noisy + peer.n_noisy,
    }


def spread(series: Series, digits: int = 1) -> str:
    """Print a series: `102.3 [101.0 to 102.9]`, median and quartiles."""
    low, high = series.quartiles
    return f"{series.median:.{digits}f} [{low:.{digits}f} to {high:.{digits}f}]"


def noise(*series: Series) -> str:
    """Say how many runs others disturbed."""
    noisy, runs = sum(each.n_noisy for each in series), sum(len(each.values) for each in series)
    return f"{noisy} of {runs} noisy" if noisy else "quiet"


def plain(value: float) -> float | None:
    """Round for JSON, which has no infinity."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def show(report: Report) -> None:
    """Print table, demands and notes to standard output."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    state = report.machine
    table = Table(title=f"{report.bench}: {report.params.name}", title_justify="left")
    for i, column in enumerate(report.columns):
        table.add_column(column, justify="right" if i else "left")
    for row in report.rows:
        table.add_row(*row)
    console.print(table)
    for criterion in report.criteria:
        sense = "at most" if criterion.at_most else "at least"
        verdict = "met   " if criterion.met else "MISSED"
        console.print(f"{verdict} {criterion.what}: {criterion.value:.4g}, {sense} "
                      f"{criterion.limit:.4g}", markup=False)  # fmt: skip
    for note in report.notes:
        console.print(note, markup=False)
    runs = f"{report.params.warmup} warm-up, {report.params.reps} runs each, alternating; "
    console.print(
        f"{runs if report.timed else ''}"
        f"{state['cpu']}, {state['cores']} cores, load average {state['load_average']}, "
        f"{format_bytes(psutil.virtual_memory().available)} of memory free", markup=False,
    )  # fmt: skip


def show_json(report: Report) -> None:
    """Print the one JSON object, on one line."""
    print(json.dumps(report.to_dict()), flush=True)
