"""The table, demands and JSON of the layers benchmark."""

import statistics
from collections.abc import Iterator
from typing import Final

from edgeroute.runtime.units import format_bytes
from edgeroute.tools.bench import pairs
from edgeroute.tools.bench.experts_ceiling import Ceiling
from edgeroute.tools.bench.experts_engines import Life
from edgeroute.tools.bench.experts_report import FIGURES, Found, row
from edgeroute.tools.bench.report import Criterion, Report, pair_result, spread

TARGET_OVERLAPPED: Final = 0.8


def make_report(found: Found) -> Report:
    """Put what was found beside its ceilings and demands."""
    peer = ("llama.cpp mmap", "ratio") if "llama.cpp" in found.lives else ()
    ceilings = {
        "decode": found.ceiling(lambda life: life.decode),
        "prefill": found.ceiling(lambda life: life.prefill),
    }
    return Report(
        bench="layers", params=found.params, columns=("", "edgeroute", *peer, "runs"),
        rows=tuple(row(found, *figure) for figure in FIGURES),
        results=_results(found, ceilings), criteria=tuple(_criteria(found, ceilings["decode"])),
        notes=tuple(_notes(found, ceilings)),
    )  # fmt: skip


def _criteria(found: Found, decode: Ceiling) -> Iterator[Criterion]:
    if "llama.cpp" in found.lives:
        ratio = pairs.ratio(found.decode["edgeroute"], found.decode["llama.cpp"])
        yield Criterion(what="decode over llama.cpp's mmap", value=ratio, limit=found.target)
    yield Criterion(what="decode over the overlapped ceiling",
                    value=found.decode["edgeroute"].median * decode.overlapped_s,
                    limit=TARGET_OVERLAPPED)  # fmt: skip


def _notes(found: Found, ceilings: dict[str, Ceiling]) -> Iterator[str]:
    pager = found.lives["edgeroute"][-1].pager
    yield (f"limit {format_bytes(found.limit_bytes)} by the kernel (page cache counts), budget "
           f"{format_bytes(found.budget_bytes)}, file {format_bytes(found.geometry.file_bytes)}; "
           f"{pager['resident']} layers stay, {pager['streamed']} stream")  # fmt: skip
    decode = ceilings["decode"]
    yield (f"store {format_bytes(found.store_bytes_s)}/s; {format_bytes(decode.moved_bytes)} "
           f"moved and {decode.resident_s * 1e3:.1f} ms computed per token")  # fmt: skip
    for name, ceiling in ceilings.items():
        speed = _speed(found, name)
        yield (f"{name} ceilings: serial {1 / ceiling.serial_s:.2f} tok/s (reached "
               f"{speed * ceiling.serial_s:.2f}), overlapped {1 / ceiling.overlapped_s:.2f} "
               f"tok/s (reached {speed * ceiling.overlapped_s:.2f})")  # fmt: skip
    resident = found.decode.get("resident")
    if resident is not None:
        yield f"all in memory, equal kernels, no limit: {spread(resident, 2)} tok/s"
    yield from found.notes


def _speed(found: Found, phase: str) -> float:
    speeds: list[float] = [getattr(life, phase).tok_s for life in found.lives["edgeroute"]]
    return statistics.median(speeds)


def _results(found: Found, ceilings: dict[str, Ceiling]) -> list[dict[str, object]]:
    results: list[dict[str, object]] = [{
        "limit_bytes": found.limit_bytes,
        "budget_bytes": found.budget_bytes,
        "file_bytes": found.geometry.file_bytes,
        "store_bytes_s": round(found.store_bytes_s),
        "ceilings_per_token": {name: each.to_dict() for name, each in ceilings.items()},
        "reached": {
            name: {"serial": round(_speed(found, name) * each.serial_s, 4),
                   "overlapped": round(_speed(found, name) * each.overlapped_s, 4)}
            for name, each in ceilings.items()
        },
        "peak_bytes": {name: list(peaks) for name, peaks in found.peaks.items()},
        "lives": {name: [_life(life) for life in lives] for name, lives in found.lives.items()},
    }]  # fmt: skip
    if "llama.cpp" in found.lives:
        for what, unit, read in FIGURES:
            ours, theirs = found.series("edgeroute", read), found.series("llama.cpp", read)
            results.append(pair_result({"what": what}, unit, ours, theirs))
    return results


def _life(life: Life) -> dict[str, object]:
    """Return a run's JSON, without a pager's counters that streaming has not."""
    pager = {name: value for name, value in life.pager.items() if name != "decode"}
    return life.to_dict() | {"pager": pager}
