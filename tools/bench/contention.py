"""Decoding beside busy processes: the thread policy against fixed counts and llama.cpp's defaults.

What is slow here is a thread that lost its core while the others wait for it. Two parts:
steady speed beside 0, 1 and 2 busy processes, and how soon the policy settles when load
comes and goes.
"""

import functools
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import psutil

from edgeroute.runtime import machine
from edgeroute.tools.bench import pairs, report
from edgeroute.tools.bench.busy import BusyProcesses
from edgeroute.tools.bench.engines import Ours, Stamps, Theirs, rate_after
from edgeroute.tools.bench.pairs import Series
from edgeroute.tools.bench.peer import PeerParams, default_threads
from edgeroute.tools.bench.report import BenchParams, Criterion, Report
from edgeroute.tools.bench.settle import settle_s
from edgeroute.tools.bench.workers import Engine, Worker

N_BUSY = (0, 1, 2)
N_PROMPT, N_CTX = 32, 2048
LEAD_RATIO = 0.5  # of a window, run before it and not counted: time to settle
TARGETS = {1: 2.0, 2: 4.0}
IDLE_TARGET, SETTLE_TARGET_S = 0.95, 2.0
POLICY = "edgeroute, policy"


def peer_thread_counts() -> dict[int, str]:
    """What llama.cpp's own callers use when told nothing, by number of threads."""
    found: dict[int, str] = {}
    for n_threads, whose in (
        (default_threads(), "llama_context_default_params"),
        (program_threads(), "its programs: cores"),
        (max(multiprocessing.cpu_count() // 2, 1), "llama-cpp-python: cores // 2"),
    ):
        found[n_threads] = f"{found[n_threads]}; {whose}" if n_threads in found else whose
    return found


def program_threads() -> int:
    """Threads of llama.cpp's programs when told nothing, which is what is to be beaten.

    The constant of `llama_context_default_params` is shown beside it: on two cores it is half as
    quick as they are on an idle machine, and on one core nobody waits for anybody.
    """
    return psutil.cpu_count(logical=False) or machine.usable_cores()


def run(params: BenchParams, progress: pairs.Progress, n_busy: Sequence[int] = N_BUSY) -> Report:
    """Measure steady tokens per second beside each number of busy processes, then settling."""
    counts = peer_thread_counts()
    with Worker(Ours, params.path, {"threads": 1, "n_ctx": N_CTX}) as worker:
        prompt = worker.call("text", N_PROMPT)
    runners: dict[str, Callable[[], float]] = {POLICY: _ours(params, prompt, None)}
    for threads in sorted({1, machine.usable_cores()}):
        runners[_name("edgeroute", threads)] = _ours(params, prompt, threads)
    for threads in counts:
        runners[_peer(threads)] = _theirs(params, prompt, threads)
    measured: dict[int, dict[str, Series]] = {}
    for n in n_busy:
        progress(f"beside {n} busy processes")
        with BusyProcesses(n):
            measured[n] = pairs.alternate(runners, params.plan, progress)
    progress("settling when load comes and goes")
    settled = {n: _settling(params, prompt, n, progress) for n in n_busy if n}
    return _report(params, counts, measured, settled)


def _name(engine: str, threads: int) -> str:
    return f"{engine}, {threads} thread{'s' if threads > 1 else ''}"


def _peer(threads: int) -> str:
    return _name("llama.cpp", threads)


def _ours(params: BenchParams, prompt: list[int], threads: int | None) -> Callable[[], float]:
    """Decode in a fresh process for a lead and a window; tokens per second in the window."""
    return functools.partial(_rate, params, prompt, Ours, {"threads": threads, "n_ctx": N_CTX})


def _theirs(params: BenchParams, prompt: list[int], threads: int) -> Callable[[], float]:
    """The same with llama_decode and argmax."""
    settings = PeerParams(n_ctx=N_CTX, threads=threads)
    return functools.partial(_rate, params, prompt, Theirs, settings)


def _rate(
    params: BenchParams, prompt: list[int], engine: Callable[..., Engine], settings: object
) -> float:
    lead_s = LEAD_RATIO * params.window_s
    with Worker(engine, params.path, settings) as worker:
        stamps: Stamps = worker.call("stream", prompt, lead_s + params.window_s)
    return rate_after(stamps, lead_s)


def _settling(
    params: BenchParams, prompt: list[int], n: int, progress: pairs.Progress
) -> tuple[Series, Series]:
    """Let load come and go in the middle of decoding; how long until speed is steady again.

    Returns:
        Seconds after it came, and after it went.
    """
    came, went = [], []
    segment_s = params.window_s
    for rep in range(params.reps):
        with (
            Worker(Ours, params.path, {"n_ctx": N_CTX}) as worker,
            busy_schedule(BusyProcesses(n), segment_s) as at,
        ):
            stamps: Stamps = worker.call("stream", prompt, 3 * segment_s)
        came.append(settle_s([s for s in stamps if at[0] <= s[0] < at[1]], at[0]))
        went.append(settle_s([s for s in stamps if s[0] >= at[1]], at[1]))
        progress(
            f"load of {n}, run {rep + 1}/{params.reps}: "
            f"settled {came[-1]:.2f} s after it came, {went[-1]:.2f} s after it went"
        )
    return Series(values=tuple(came), others=()), Series(values=tuple(went), others=())


@contextmanager
def busy_schedule(busy: BusyProcesses, segment_s: float) -> Iterator[list[float]]:
    """Start the processes one segment from now and kill them after another.

    Yields:
        A list that holds both times once the context is left.
    """
    times: list[float] = []
    leave = threading.Event()

    def play() -> None:
        leave.wait(segment_s)
        times.append(time.monotonic())
        if not leave.is_set():
            busy.start()
            leave.wait(segment_s)
        times.append(time.monotonic())
        busy.stop()

    with ThreadPoolExecutor(1, "busy-schedule") as aside:
        playing = aside.submit(play)
        try:
            yield times
        finally:
            leave.set()
            try:
                playing.result()
            finally:
                busy.stop()


def _report(
    params: BenchParams, counts: dict[int, str], measured: dict[int, dict[str, Series]],
    settled: dict[int, tuple[Series, Series]],
) -> Report:  # fmt: skip
    rows, results, criteria = [], [], []
    for n, found in measured.items():
        policy = found[POLICY]
        over = {name: pairs.ratio(policy, series) for name, series in found.items()}
        for name, series in found.items():
            rows.append((str(n), name, report.spread(series), f"{over[name]:.2f}",
                         report.noise(series)))  # fmt: skip
        result: dict[str, object] = {
            "n_busy": n,
            "unit": "tok/s",
            "runs": {name: series.to_dict() for name, series in found.items()},
            "policy_over": {name: report.plain(value) for name, value in over.items()},
        }
        if n in settled:
            came, went = settled[n]
            result |= {"settled_after_load_came_s": came.to_dict(),
                       "settled_after_load_went_s": went.to_dict()}  # fmt: skip
        results.append(result)
        criteria += _criteria(n, found, counts, settled.get(n))
    return Report(
        bench="contention", params=params, rows=tuple(rows), results=results,
        columns=("busy", "", "tok/s", "policy over it", "runs"), criteria=tuple(criteria),
        notes=tuple(f"{_peer(threads)} is the default of {whose}"
                    for threads, whose in counts.items()),
    )  # fmt: skip


def _criteria(
    n: int, found: dict[str, Series], counts: dict[int, str],
    settled: tuple[Series, Series] | None,
) -> list[Criterion]:  # fmt: skip
    policy, made = found[POLICY], []
    if n == 0:
        fixed = [s for name, s in found.items() if name.startswith("edgeroute") and name != POLICY]
        best = max(fixed, key=lambda series: series.median)
        made.append(Criterion(what="idle, policy over the best fixed number of threads",
                              value=pairs.ratio(policy, best), limit=IDLE_TARGET))  # fmt: skip
    n_threads = program_threads()
    if n in TARGETS and n_threads > 1:
        what = f"{n} busy, policy over {_peer(n_threads)} ({counts[n_threads]})"
        value = pairs.ratio(policy, found[_peer(n_threads)])
        made.append(Criterion(what=what, value=value, limit=TARGETS[n]))
    for what, series in zip(("came", "went"), settled or (), strict=False):
        what = f"{n} busy, seconds to settle after load {what}"
        made.append(Criterion(what=what, value=series.median, limit=SETTLE_TARGET_S, at_most=True))
    return made
