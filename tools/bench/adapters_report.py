"""What the benchmark of adapters found, as table, criteria and JSON."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from edgeroute.runtime.units import format_bytes
from edgeroute.tools.bench import report
from edgeroute.tools.bench.pairs import Series
from edgeroute.tools.bench.report import BenchParams, Criterion, Report

MIXED_TARGET: Final = 0.85
RESIDENT_TARGET_S: Final = 0.005
DISK_TARGET_S: Final = 0.010
"""Beyond what reading its bytes takes."""
ROUTE_TARGET_S: Final = 0.002
OURS, THEIRS = "edgeroute", "llama.cpp"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Tokens per second of two runs in one process, pair by pair, and their ratio."""

    ratio: Series
    base: Series
    changed: Series

    def to_dict(self) -> dict[str, object]:
        return {
            "ratio": self.ratio.to_dict(),
            "base": self.base.to_dict(),
            "changed": self.changed.to_dict(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Switches:
    """Seconds by kind of switch.

    Attributes:
        n_bytes: of one adapter's file.
        ttft: from the request to its first token.
        waits: of these, until the adapter was in place. llama.cpp does more of it in its next
            decode, for which it plans its memory anew.
        disk: reading an adapter's file alone, dropped from the page cache as for a switch.
        cache: how it was dropped.
    """

    n_bytes: int
    ttft: Mapping[str, Series]
    waits: Mapping[str, Series]
    disk: Series
    cache: str

    def cost_s(self, name: str) -> float:
        """What a switch costs: the wait, or what it delays the first token, whichever is more."""
        engine = name.partition(":")[0]
        delay = self.ttft[name].median - self.ttft[f"{engine}: no change"].median
        return max(self.waits[name].median, delay)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """All that was measured; parts left out are empty."""

    params: BenchParams
    rank: int
    n_mixed: int
    n_prompt: int
    n_named: int
    max_cost: float
    decode: Mapping[str, Pairs]
    mixed: Mapping[str, Pairs]
    prefill: Mapping[str, Pairs]
    switches: Switches | None
    routing: Sequence[float]


_Row = tuple[str, ...]


def make_report(found: Found) -> Report:
    """Put rows, results and demands together."""
    rows: list[_Row] = []
    results: list[dict[str, object]] = []
    criteria: list[Criterion] = []
    parts = (
        ("decode", "decode", found.decode),
        ("mixed", f"decode of {found.n_mixed}, one adapter each", found.mixed),
        ("prefill", f"prefill of {found.n_prompt}", found.prefill),
    )
    for part, label, measured in parts:
        rows += [_pair_row(f"{name}: {label}", each) for name, each in measured.items()]
        if measured:
            results.append({"part": part, "unit": "tok/s"} | {
                name: each.to_dict() for name, each in measured.items()
            })  # fmt: skip
    criteria += _pair_criteria(found)
    notes = [f"adapters of rank {found.rank} on all linear layers, F16; base: without an "
             "adapter, or one adapter for all sequences"]  # fmt: skip
    if found.switches is not None:
        rows += _switch_rows(found.switches)
        results.append(_switch_result(found.switches))
        criteria += _switch_criteria(found.switches)
        notes.append(f"an adapter's file has {format_bytes(found.switches.n_bytes)}; "
                     f"{found.switches.cache}")  # fmt: skip
    if found.routing:
        ms = statistics.median(found.routing) * 1e3
        rows.append((f"routing among {found.n_named}, ms", "", f"{ms:.3f}", "", ""))
        results.append({"part": "routing", "unit": "s", "n_adapters": found.n_named,
                        "median": report.plain(ms / 1e3),
                        "max": report.plain(max(found.routing))})  # fmt: skip
        criteria.append(Criterion(what=f"ms to route a prompt among {found.n_named}", value=ms,
                                  limit=ROUTE_TARGET_S * 1e3, at_most=True))  # fmt: skip
    return Report(
        bench="adapters", params=found.params, rows=tuple(rows), results=results,
        columns=("", "base", "changed", "ratio", "runs"), criteria=tuple(criteria),
        notes=tuple(notes),
    )  # fmt: skip


def _pair_row(label: str, each: Pairs) -> _Row:
    return (label, report.spread(each.base), report.spread(each.changed),
            report.spread(each.ratio, 3), report.noise(each.ratio))  # fmt: skip


def _pair_criteria(found: Found) -> list[Criterion]:
    criteria = []
    if found.decode:
        kept = found.decode[OURS].ratio.median
        criteria.append(Criterion(what="share of the decoding speed that an adapter costs",
                                  value=1 - kept, limit=found.max_cost, at_most=True))  # fmt: skip
        if THEIRS in found.decode:
            criteria.append(Criterion(what="that share less llama.cpp's own", limit=0.0,
                                      value=found.decode[THEIRS].ratio.median - kept,
                                      at_most=True))  # fmt: skip
    if found.mixed:
        criteria.append(Criterion(
            what=f"{found.n_mixed} adapters over one, {found.n_mixed} sequences",
            value=found.mixed[OURS].ratio.median, limit=MIXED_TARGET,
        ))  # fmt: skip
    return criteria


def _switch_rows(switches: Switches) -> list[_Row]:
    rows: list[_Row] = []
    for name, wait in switches.waits.items():
        ms = Series(values=tuple(1e3 * each for each in wait.values), others=wait.others)
        first = switches.ttft[name]
        first = Series(values=tuple(1e3 * each for each in first.values), others=first.others)
        rows.append((f"{name}, ms: wait; first token", report.spread(ms, 2),
                     report.spread(first), "", report.noise(ms)))  # fmt: skip
    disk = Series(values=tuple(1e3 * each for each in switches.disk.values),
                  others=switches.disk.others)  # fmt: skip
    rate = switches.n_bytes / switches.disk.median
    rows.append((f"its bytes from disk, ms; at {format_bytes(rate)}/s", report.spread(disk, 2),
                 "", "", report.noise(disk)))  # fmt: skip
    return rows


def _switch_result(switches: Switches) -> dict[str, object]:
    return {
        "part": "switch",
        "unit": "s",
        "n_bytes": switches.n_bytes,
        "disk": switches.disk.to_dict(),
        "wait": {name: each.to_dict() for name, each in switches.waits.items()},
        "first_token": {name: switches.ttft[name].to_dict() for name in switches.waits},
        "cost": {name: report.plain(switches.cost_s(name)) for name in switches.waits},
    }


def _switch_criteria(switches: Switches) -> list[Criterion]:
    in_memory, from_disk = (1e3 * switches.cost_s(f"{OURS}: {kind}")
                            for kind in ("in memory", "from disk"))  # fmt: skip
    limit = 1e3 * (switches.disk.median + DISK_TARGET_S)
    return [
        Criterion(what="ms to switch to an adapter in memory", value=in_memory,
                  limit=1e3 * RESIDENT_TARGET_S, at_most=True),
        Criterion(what="ms to switch to one on disk, against its bytes at the disk's speed + 10",
                  value=from_disk, limit=round(limit, 3), at_most=True),
    ]  # fmt: skip
