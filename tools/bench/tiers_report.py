"""The table of `bench tiers`: speeds of each way, where experts were found, and the demands."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

from edgeroute.tools.bench.pairs import Series
from edgeroute.tools.bench.report import BenchParams, Criterion, Report, plain, spread

MODES: Final = ("off", "on", "auto")
"""Settings of `host_experts`; all but the last are fixed choices."""
COLUMNS: Final = ("link", "way", "tok/s", "time vs better fixed", "device hits", "DRAM hits",
                  "disk reads", "computed here", "now")  # fmt: skip
_SUMMED: Final = ("hits", "misses", "uploaded", "away", "dram_hits", "dram_late", "disk_reads")


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """What the tiers of one runtime counted, decode and prefill together.

    Attributes:
        counts: over all layers, by name.
        n_broken: layers, prefill and decode apart, whose device misses are not what DRAM found
            and the disk gave, or not what was uploaded and left to the processor.
        gate: the gate's report.
        device_ratio: slots over experts on the device, and `dram_ratio` in DRAM.
    """

    counts: Mapping[str, int]
    n_broken: int
    gate: Mapping[str, Any]
    device_ratio: float
    dram_ratio: float

    @classmethod
    def of(cls, experts: Mapping[str, Any]) -> Self:
        """Read what `stats` says of experts."""
        device = experts["device"]
        layers = [layer for kind in ("decode", "prefill") for layer in device["layers"][kind]]
        return cls(
            counts={name: sum(layer[name] for layer in layers) for name in _SUMMED},
            n_broken=sum(not reconciles(layer) for layer in layers),
            gate=device["host_experts"],
            device_ratio=device["n_slots"] / device["n_pages"],
            dram_ratio=experts["n_slots"] / experts["n_pages"],
        )  # fmt: skip

    @property
    def cells(self) -> tuple[str, ...]:
        """What the table says of it."""
        n = self.counts
        asked, missed = n["hits"] + n["misses"], n["misses"]
        return (
            _share(n["hits"], asked), _share(n["dram_hits"] + n["dram_late"], missed),
            str(n["disk_reads"]), _share(n["away"], missed), str(self.gate["state"]),
        )  # fmt: skip

    def to_dict(self) -> dict[str, object]:
        """Return all figures as plain JSON types."""
        return {
            **self.counts, "n_broken": self.n_broken, "gate": dict(self.gate),
            "device_ratio": round(self.device_ratio, 4), "dram_ratio": round(self.dram_ratio, 4),
        }  # fmt: skip


def reconciles(layer: Mapping[str, int]) -> bool:
    """Whether each device miss of a layer was found in one place, and went one way."""
    found = layer["dram_hits"] + layer["dram_late"] + layer["disk_reads"]
    return layer["misses"] == found == layer["uploaded"] + layer["away"]


def say_link(bytes_s: int) -> str:
    """Name the speed of a link, in powers of ten as networks are."""
    return f"{bytes_s / 1e6:g} MB/s"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What was measured over one link, by way; `first_s` are the seconds of a first answer."""

    link_bytes_s: int
    series: Mapping[str, Series]
    lives: Mapping[str, Life]
    same_answers: bool
    first_s: Mapping[str, float]

    @property
    def better(self) -> str:
        """The fixed choice with the higher median speed."""
        return max(MODES[:-1], key=lambda mode: self.series[mode].median)

    def time_ratio(self, mode: str) -> float:
        """Time per token over that of the better fixed choice."""
        return self.series[self.better].median / self.series[mode].median

    @property
    def link(self) -> str:
        """The speed in words."""
        return say_link(self.link_bytes_s)

    def rows(self) -> list[tuple[str, ...]]:
        """One row per way."""
        return [
            (self.link, mode, spread(self.series[mode], 2), f"{self.time_ratio(mode):.3f}",
             *self.lives[mode].cells)
            for mode in MODES
        ]  # fmt: skip

    def to_dict(self) -> dict[str, object]:
        """Return all figures as plain JSON types."""
        return {
            "link_bytes_s": self.link_bytes_s,
            "better_fixed": self.better,
            "same_answers": self.same_answers,
            "ways": {
                mode: {
                    "tok_s": self.series[mode].to_dict(),
                    "time_ratio": plain(self.time_ratio(mode)),
                    "first_answer_s": plain(self.first_s[mode]), **self.lives[mode].to_dict(),
                }
                for mode in MODES
            },
        }  # fmt: skip


def make_report(
    params: BenchParams, found: Sequence[Found], policies: Mapping[str, Life], most_ratio: float
) -> Report:
    """Put together what was measured."""
    lives = [life for each in found for life in each.lives.values()] + list(policies.values())
    criteria = [
        Criterion(what=f"{each.link}: time of auto over the better fixed choice, {each.better}",
                  value=each.time_ratio("auto"), limit=most_ratio, at_most=True)
        for each in found
    ]  # fmt: skip
    criteria.append(
        Criterion(what="layers whose tiers do not reconcile",
                  value=sum(life.n_broken for life in lives), limit=0, at_most=True)
    )  # fmt: skip
    criteria.append(
        Criterion(what="links over which the ways answered differently",
                  value=sum(not each.same_answers for each in found), limit=0, at_most=True)
    )  # fmt: skip
    rows = [row for each in found for row in each.rows()]
    rows += [("", f"policy {name}", "", "", *life.cells) for name, life in policies.items()]
    notes = [f"slots on the device for {lives[0].device_ratio:.1%} of the experts, in DRAM for "
             f"{lives[0].dram_ratio:.1%}"]  # fmt: skip
    notes += [_costs(each) for each in found]
    results: list[dict[str, object]] = [each.to_dict() for each in found]
    results += [{"policy": name, **life.to_dict()} for name, life in policies.items()]
    return Report(
        bench="tiers", params=params, columns=COLUMNS, rows=tuple(rows), results=results,
        criteria=tuple(criteria), notes=tuple(notes),
    )  # fmt: skip


def _costs(found: Found) -> str:
    """Say what an expert cost either way, as the gate measured it."""
    gate = found.lives["auto"].gate
    parts = [
        f"{name} {1e3 * cost['fixed_s']:.2f} ms and {1e3 * cost['each_s']:.2f} ms per expert"
        for name, cost in (("uploading", gate["upload"]), ("computing", gate["compute"]))
        if cost is not None
    ]
    first = ", ".join(f"{mode} {found.first_s[mode]:.2f} s" for mode in MODES)
    return (f"{found.link}: {'; '.join(parts)}; {gate['n_trials']} trials, "
            f"{gate['n_changes']} changes of mind; first answer: {first}")  # fmt: skip
