"""Many clients of every kind at once: what is answered, what is left behind, what memory does."""

import asyncio
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from edgeroute.runtime.errors import EdgerouteError
from edgeroute.runtime.units import MIB, format_bytes
from edgeroute.tools.bench import report
from edgeroute.tools.bench.pairs import Progress
from edgeroute.tools.bench.report import BenchParams, Criterion, Report
from edgeroute.tools.bench.serve_http import BrokenAnswer, fetch
from edgeroute.tools.bench.serve_outcome import Place, Tally
from edgeroute.tools.bench.serve_servers import Served, ServedModel, loaded_server, running
from edgeroute.tools.bench.serve_visits import VISITS, Visit, answer_of, visit

MODEL: Final = "base"
MAX_BODY_BYTES: Final = 1 << 20
N_CTX, N_SEQ = 2048, 4
MAX_GROWTH: Final = 0.03
PROMPT: Final = "Name three rivers."
_SAMPLE_S: Final = 0.5
_TELL_S: Final = 30.0
_DRAIN_S: Final = 30.0
_IN_USE: Final = ("edgeroute_requests_in_flight", "edgeroute_engine_requests",
                  "edgeroute_kv_cells")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadParams:
    """How much load.

    Attributes:
        seconds: after the warm-up, until no new visit begins; those under way come to their end.
        seed: of what clients do; the order in which they come is the machine's.
        stall_s: how long the server lets a reader take nothing; slow ones pause in proportion.
        warmup_s: of load before memory's first minute, in which caches fill; all else counts.
    """

    n_clients: int = 32
    seconds: float = 600.0
    seed: int = 1
    stall_s: float = 5.0
    warmup_s: float = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a run of load showed.

    Attributes:
        rss: (seconds since the start, resident bytes), in order.
        rss_cold: resident bytes after the first answer.
        seconds: until the last visit ended.
        same: whether the server answers afterwards as before.
        in_use: what it holds afterwards for requests, by metric; all should be 0.
        ready: status of its health check afterwards.
    """

    tally: Tally
    rss: Sequence[tuple[float, int]]
    rss_cold: int
    seconds: float
    same: bool
    in_use: Mapping[str, float]
    ready: int


def run(params: BenchParams, progress: Progress, wanted: LoadParams) -> Report:
    """Start a server of ours and let all clients at it.

    Raises:
        EdgerouteError: the server could not be started, or ended.
    """
    model = ServedModel(path=params.path, threads=params.threads, n_ctx=N_CTX, n_seq=N_SEQ)
    plan = loaded_server(model, max_body_bytes=MAX_BODY_BYTES, stall_s=wanted.stall_s,
                         max_waiting=max(2, wanted.n_clients * 3 // 4))  # fmt: skip
    with running((plan,)) as servers:
        server = servers[plan.name]
        progress(f"{wanted.n_clients} clients for {wanted.seconds:.0f} s")
        found = asyncio.run(_load(server, wanted, progress))
    return _report(params, wanted, found, plan.told)


async def _load(server: Served, wanted: LoadParams, progress: Progress) -> Found:
    healthy = _place(server, wanted, -1)
    before = await answer_of(healthy, PROMPT)
    cold = server.rss_bytes
    tally, began = Tally(), time.monotonic()
    rss: list[tuple[float, int]] = []
    until = began + wanted.warmup_s + wanted.seconds
    async with asyncio.TaskGroup() as group:
        watching = group.create_task(_watch(server, rss, tally, progress))
        clients = [group.create_task(_client(_place(server, wanted, i), until, tally))
                   for i in range(wanted.n_clients)]  # fmt: skip
        await asyncio.wait(clients)
        watching.cancel()
    seconds = time.monotonic() - began
    in_use = await _settled(healthy)
    head, _ = await fetch(server.address, "/health/ready")
    same = await answer_of(healthy, PROMPT) == before
    return Found(tally=tally, rss=rss, rss_cold=cold, seconds=seconds, same=same, in_use=in_use,
                 ready=head.status)  # fmt: skip


def _place(server: Served, wanted: LoadParams, i: int) -> Place:
    return Place(address=server.address, rng=random.Random(f"{wanted.seed} {i}"), model=MODEL,
                 n_ctx=N_CTX, max_body_bytes=MAX_BODY_BYTES, stall_s=wanted.stall_s)  # fmt: skip


async def _client(place: Place, until: float, tally: Tally) -> None:
    kinds: list[Visit] = list(VISITS)
    weights = [VISITS[kind] for kind in kinds]
    while time.monotonic() < until:
        outcome = await visit(place.rng.choices(kinds, weights)[0], place)
        tally.add(outcome)
        if outcome.status in (429, 503) or outcome.fault is not None:
            await asyncio.sleep(0.2 + 0.3 * place.rng.random())  # a client that waits its turn


async def _watch(
    server: Served, rss: list[tuple[float, int]], tally: Tally, progress: Progress
) -> None:
    began = told = time.monotonic()
    while True:
        now = time.monotonic()
        rss.append((now - began, server.rss_bytes))
        if now - told >= _TELL_S:
            told = now
            progress(f"{now - began:.0f} s: {tally.n_visits} visits, {tally.n_faults} faults, "
                     f"{format_bytes(rss[-1][1])} resident")  # fmt: skip
        await asyncio.sleep(_SAMPLE_S)


async def _settled(place: Place) -> dict[str, float]:
    """Wait until nothing is held for requests any more; return what still is."""
    deadline = time.monotonic() + _DRAIN_S
    while True:
        _, body = await fetch(place.address, "/metrics")
        found = in_use(body.decode())
        if not any(found.values()) or time.monotonic() > deadline:
            return found
        await asyncio.sleep(0.2)


def in_use(metrics: str) -> dict[str, float]:
    """Read from a page of metrics what is held for requests, summed over models.

    Cells are all of them less the free ones and those kept for later prompts.

    Raises:
        BrokenAnswer: the page does not tell it.
    """
    found: dict[str, float] = {}
    for line in metrics.splitlines():
        name, _, labels = line.rpartition(" ")[0].partition("{")
        if name in _IN_USE:
            sign = -1.0 if 'state="free"' in labels or 'state="kept"' in labels else 1.0
            found[name] = found.get(name, 0.0) + sign * float(line.rpartition(" ")[2])
    if missing := set(_IN_USE) - set(found):
        raise BrokenAnswer(f"/metrics does not tell {', '.join(sorted(missing))}")
    return found


def growth(rss: Sequence[tuple[float, int]], window_s: float) -> tuple[float, int, int]:
    """Compare resident memory of the first and the last seconds.

    Args:
        rss: (seconds, bytes), in order.
        window_s: length of both windows.

    Returns:
        Growth as a share, and the medians of both windows in bytes.

    Raises:
        EdgerouteError: there are no samples.
    """
    if not rss:
        raise EdgerouteError("no memory was sampled: the load ended at once")
    end = rss[-1][0]
    first = int(statistics.median(n for at, n in rss if at <= window_s))
    last = int(statistics.median(n for at, n in rss if at >= end - window_s))
    return last / first - 1, first, last


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which a share (0 to 1) of all lie; nan where there are none."""
    if not values:
        return float("nan")
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def _report(params: BenchParams, wanted: LoadParams, found: Found, told: str) -> Report:
    tally, window_s = found.tally, min(60.0, wanted.seconds / 4)
    counted = [(at - wanted.warmup_s, n) for at, n in found.rss if at >= wanted.warmup_s]
    grown, first, last = growth(counted, window_s)
    ttft = {f"p{share * 100:.0f}": percentile(tally.ttft_s, share) for share in (0.5, 0.99)}
    speed = tally.n_events / found.seconds
    rows = tuple((kind, ", ".join(f"{n} x {status}" for status, n in sorted(statuses.items())))
                 for kind, statuses in sorted(tally.statuses.items()))  # fmt: skip
    held = sum(found.in_use.values())
    return Report(
        bench="serve: load", params=params, columns=("visit", "statuses"), rows=rows, timed=False,
        results=[{
            "n_clients": wanted.n_clients, "seconds": report.plain(found.seconds),
            "n_visits": tally.n_visits, "statuses": tally.statuses, "ends": tally.ends,
            "ttft_s": {name: report.plain(value) for name, value in ttft.items()},
            "n_streams": len(tally.ttft_s), "texts_s": report.plain(speed),
            "rss_cold_bytes": found.rss_cold, "rss_first_bytes": first, "rss_last_bytes": last,
            "rss_growth": report.plain(grown),
            "rss_by_minute_bytes": by_minute(found.rss),
            "in_use_after": found.in_use, "faults": tally.faults, "n_faults": tally.n_faults,
        }],
        criteria=(
            Criterion(what="answers that must not come", value=tally.n_faults, limit=0,
                      at_most=True),
            Criterion(what=f"memory's change, first to last {window_s:.0f} s", value=abs(grown),
                      limit=MAX_GROWTH, at_most=True),
            Criterion(what="held for requests after the last", value=held, limit=0, at_most=True),
            Criterion(what="ready and answering as before", limit=1,
                      value=float(found.ready == 200 and found.same)),
        ),
        notes=(
            f"{wanted.n_clients} clients, {found.seconds:.0f} s, {tally.n_visits} visits; ends: "
            + ", ".join(f"{n} {name}" for name, n in sorted(tally.ends.items())),
            f"first text after {ttft['p50']:.3f} s (median), {ttft['p99']:.3f} s (99 of 100) in "
            f"{len(tally.ttft_s)} streams; {speed:.1f} texts/s in streams",
            f"resident {format_bytes(first)} at first, {format_bytes(last)} at last "
            f"({grown:+.2%}); largest {format_bytes(max(n for _, n in found.rss))}",
            f"{told}; the first {wanted.warmup_s:g} s do not count for memory: it was "
            f"{format_bytes(found.rss_cold)} before them",
            *(f"FAULT {fault}" for fault in tally.faults),
        ),
    )  # fmt: skip


def by_minute(rss: Sequence[tuple[float, int]]) -> list[int]:
    """Return the median of resident bytes of each minute, to the nearest MiB."""
    minutes: dict[int, list[int]] = {}
    for at, n_bytes in rss:
        minutes.setdefault(int(at // 60), []).append(n_bytes)
    return [round(statistics.median(each) / MIB) * MIB for _, each in sorted(minutes.items())]
