"""The table, demands and JSON of the experts benchmark."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from edgeroute.runtime.units import format_bytes
from edgeroute.tools.bench import pairs
from edgeroute.tools.bench.experts_ceiling import Ceiling, Geometry, Replayed
from edgeroute.tools.bench.experts_engines import Life, Phase, counters
from edgeroute.tools.bench.pairs import Series
from edgeroute.tools.bench.report import (
    BenchParams,
    Criterion,
    Report,
    noise,
    pair_result,
    spread,
)

TARGET_SERIAL, GOAL_OVERLAPPED = 0.95, 0.75
TARGET_PREFILL, TARGET_PREFILL_CEILING, TARGET_PREFILL_READS = 1.3, 0.85, 1.1
TARGET_AFTER = 0.95
"""Decoding right after a prompt over before it; runs of one state differ by some per cent."""
TARGET_FIRST, TARGET_POLICY_POINTS, TARGET_LRU_BYTES = 1.5, 0.01, 1.1
TARGET_PYTHON_US = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Everything that was measured. `decode` has tokens per second by engine, run by run."""

    params: BenchParams
    limit_bytes: int
    budget_bytes: int
    target: float
    geometry: Geometry
    decode: Mapping[str, Series]
    lives: Mapping[str, Sequence[Life]]
    store_bytes_s: float
    peaks: Mapping[str, Sequence[int]]
    notes: tuple[str, ...]
    replayed: Replayed | None = None
    traced: Life | None = None
    python_us_per_layer: float | None = None

    def series(self, name: str, read: Callable[[Life], float]) -> Series:
        """One figure of an engine's runs."""
        values = tuple(read(life) for life in self.lives[name])
        return Series(values=values, others=self.decode[name].others)

    def median(self, name: str, read: Callable[[Life], float]) -> float:
        """Its median."""
        return statistics.median(read(life) for life in self.lives[name])

    def ceiling(self, phase: Callable[[Life], Phase]) -> Ceiling:
        """The ceiling of one phase, per token."""

        def per_token(read: Callable[[Phase], float], name: str) -> float:
            return self.median(name, lambda life: read(phase(life)) / phase(life).n_tokens)

        if "resident" in self.lives:
            resident_s = per_token(lambda part: part.seconds, "resident")
        else:  # too large to hold: the time in which the pager was not waiting
            resident_s = per_token(_computing_s, "edgeroute")
        return Ceiling(moved_bytes=per_token(lambda part: part.moved_bytes, "edgeroute"),
                       store_bytes_s=self.store_bytes_s, resident_s=resident_s)  # fmt: skip

    @property
    def first_bound_s(self) -> float:
        """Seconds in which what the first token needs could be read at all."""
        return (self.geometry.fixed_bytes + self.geometry.token_bytes) / self.store_bytes_s


def _computing_s(part: Phase) -> float:
    return part.seconds - part.experts.get("stall_s", 0.0)


FIGURES: tuple[tuple[str, str, Callable[[Life], float]], ...] = (
    ("decode", "tok/s", lambda life: life.decode.tok_s),
    ("prefill", "tok/s", lambda life: life.prefill.tok_s),
    ("decode after prefill", "tok/s", lambda life: life.after.tok_s),
    ("first token, cold", "s", lambda life: life.first.seconds),
    ("read per decoded token", "bytes", lambda life: _read_bytes(life.decode)),
    ("read by prefill", "bytes", lambda life: _read_bytes(life.prefill) * life.prefill.n_tokens),
)


def _read_bytes(part: Phase) -> float:
    """Bytes the kernel read, per token; 0 where it does not count."""
    return (part.read_bytes or 0) / part.n_tokens


def make_report(found: Found) -> Report:
    """Put what was found beside its ceilings and demands."""
    peer = ("llama.cpp mmap", "ratio") if "llama.cpp" in found.lives else ()
    return Report(
        bench="experts", params=found.params, columns=("", "edgeroute", *peer, "runs"),
        rows=tuple(row(found, *figure) for figure in FIGURES),
        results=_results(found), criteria=tuple(_criteria(found)), notes=tuple(_notes(found)),
    )  # fmt: skip


def row(found: Found, what: str, unit: str, read: Callable[[Life], float]) -> tuple[str, ...]:
    """Return a figure's line of the table."""

    def show(series: Series) -> str:
        return format_bytes(series.median) if unit == "bytes" else spread(series, 2)

    label = what if unit == "bytes" else f"{what}, {unit}"
    ours = found.series("edgeroute", read)
    if "llama.cpp" not in found.lives:
        return label, show(ours), noise(ours)
    theirs = found.series("llama.cpp", read)
    return label, show(ours), show(theirs), f"{pairs.ratio(ours, theirs):.3g}", noise(ours, theirs)


def _criteria(found: Found) -> Iterator[Criterion]:
    decode, prefill = found.ceiling(lambda life: life.decode), found.ceiling(_prefill)
    decode_s = found.median("edgeroute", lambda life: 1 / life.decode.tok_s)
    prefill_s = found.median("edgeroute", lambda life: 1 / life.prefill.tok_s)
    if "llama.cpp" in found.lives:
        ratio = pairs.ratio(found.decode["edgeroute"], found.decode["llama.cpp"])
        yield Criterion(what="decode over llama.cpp's mmap", value=ratio, limit=found.target)
        mine, theirs = (found.median(name, lambda life: life.prefill.tok_s)
                        for name in ("edgeroute", "llama.cpp"))  # fmt: skip
        yield Criterion(what="prefill over llama.cpp's mmap", value=mine / theirs,
                        limit=TARGET_PREFILL)  # fmt: skip
    yield Criterion(what="decode over the serial ceiling", value=decode.serial_s / decode_s,
                    limit=TARGET_SERIAL)  # fmt: skip
    yield Criterion(
        what="prefill over the overlapped ceiling", value=prefill.overlapped_s / prefill_s,
        limit=TARGET_PREFILL_CEILING,
    )  # fmt: skip
    yield Criterion(
        what="decode after prefill over before",
        value=found.median("edgeroute", lambda life: life.after.tok_s / life.decode.tok_s),
        limit=TARGET_AFTER,
    )
    yield Criterion(
        what="cold first token over the time to read what it needs",
        value=found.median("edgeroute", lambda life: life.first.seconds) / found.first_bound_s,
        limit=TARGET_FIRST, at_most=True,
    )  # fmt: skip
    if found.geometry.expert_bytes:
        moved = found.median("edgeroute", lambda life: life.prefill.moved_bytes)
        yield Criterion(what="bytes that prefill reads over all experts once",
                        value=moved / found.geometry.expert_bytes, limit=TARGET_PREFILL_READS,
                        at_most=True)  # fmt: skip
    yield from _policy_criteria(found)
    if found.python_us_per_layer is not None:
        yield Criterion(what="microseconds of Python per layer and token when all hit",
                        value=found.python_us_per_layer, limit=TARGET_PYTHON_US,
                        at_most=True)  # fmt: skip


def _policy_criteria(found: Found) -> Iterator[Criterion]:
    if found.replayed is None or found.traced is None:
        return
    ratios, policy = found.replayed.hit_ratios, str(found.traced.pager["policy"])
    behind = ratios[found.replayed.best] - ratios[policy]
    yield Criterion(what=f"hit rate of the best online policy ({found.replayed.best}) less that "
                    f"of the one in use ({policy})", value=behind,
                    limit=TARGET_POLICY_POINTS, at_most=True)  # fmt: skip
    read = counters(found.traced.pager, ("decode",))
    yield Criterion(what="bytes that decoding read over those of LRU by demand alone",
                    value=(read["demand_bytes"] + read["prefetch_bytes"]) / found.replayed.lru_bytes
                    if found.replayed.lru_bytes else 1.0,
                    limit=TARGET_LRU_BYTES, at_most=True)  # fmt: skip


def _prefill(life: Life) -> Phase:
    return life.prefill


def _notes(found: Found) -> Iterator[str]:
    ceiling = found.ceiling(lambda life: life.decode)
    speed = found.decode["edgeroute"].median
    yield (f"limit {format_bytes(found.limit_bytes)} by the kernel (page cache counts), budget "
           f"{format_bytes(found.budget_bytes)}, file {format_bytes(found.geometry.file_bytes)}, "
           f"{format_bytes(found.geometry.token_bytes)} of experts routed per token")  # fmt: skip
    yield (f"store {format_bytes(found.store_bytes_s)}/s; "
           f"{format_bytes(ceiling.moved_bytes)} moved and {ceiling.resident_s * 1e3:.1f} ms "
           "computed per token")  # fmt: skip
    yield (f"decode ceilings: serial {1 / ceiling.serial_s:.2f} tok/s (reached "
           f"{speed * ceiling.serial_s:.2f}), overlapped {1 / ceiling.overlapped_s:.2f} tok/s "
           f"(reached {speed * ceiling.overlapped_s:.2f}, goal {GOAL_OVERLAPPED})")  # fmt: skip
    resident = found.decode.get("resident")
    if resident is not None:
        yield f"all in memory, no limit: {spread(resident, 2)} tok/s"
    if found.replayed is not None and found.traced is not None:
        ranked = sorted(found.replayed.hit_ratios.items(), key=lambda pair: -pair[1])
        shown = ", ".join(f"{name} {ratio:.1%}" for name, ratio in ranked)
        yield f"hit rates by replay with {found.replayed.n_slots} slots: {shown}"
    yield from _overlap(found)
    yield from found.notes


def _overlap(found: Found) -> Iterator[str]:
    pagers = [life.pager for life in found.lives["edgeroute"] if "overlap" in life.pager]
    if pagers:
        states = ", ".join(str(pager["overlap"]) for pager in pagers)
        gains = [gain for pager in pagers if isinstance(gain := pager["overlap_gain"], float)]
        shown = ", ".join(f"{gain:.1%}" for gain in gains) or "no trial"
        hid_s = statistics.median(_number(pager["overlap_s"]) for pager in pagers)
        yield (f"computed while other experts of the layer were read: {hid_s:.2f} s per run; in "
               f"the end {states}; gain in the trials, of such layers' time: {shown}")  # fmt: skip


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _results(found: Found) -> list[dict[str, object]]:
    ceilings = {"decode": found.ceiling(lambda life: life.decode).to_dict(),
                "prefill": found.ceiling(_prefill).to_dict()}  # fmt: skip
    results: list[dict[str, object]] = [{
        "limit_bytes": found.limit_bytes,
        "budget_bytes": found.budget_bytes,
        "geometry": found.geometry.to_dict(),
        "store_bytes_s": round(found.store_bytes_s),
        "ceilings_per_token": ceilings,
        "first_bound_s": round(found.first_bound_s, 6),
        "python_us_per_layer": found.python_us_per_layer,
        "peak_bytes": {name: list(peaks) for name, peaks in found.peaks.items()},
        "lives": {name: [life.to_dict() for life in lives] for name, lives in found.lives.items()},
        "replay": None if found.replayed is None else found.replayed.to_dict(),
    }]  # fmt: skip
    if "llama.cpp" in found.lives:
        for what, unit, read in FIGURES:
            ours, theirs = found.series("edgeroute", read), found.series("llama.cpp", read)
            results.append(pair_result({"what": what}, unit, ours, theirs))
    return results
