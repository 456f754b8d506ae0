"""From process start to first token, and peak memory: edgeroute against llama-cpp-python."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import edgeroute
from edgeroute.runtime.errors import EdgerouteError
from edgeroute.runtime.units import format_bytes
from edgeroute.tools.bench import pairs, report
from edgeroute.tools.bench.pairs import Series
from edgeroute.tools.bench.report import BenchParams, Criterion, Report

PROMPT = "The capital of France is"
N_CTX = 4096
TARGET_TIME, TARGET_MEMORY = 1.2, 1.1
_ENGINES = {"edgeroute": "edgeroute", "llama.cpp": "llama_cpp"}
_NO_BYTECODE = "PYTHONDONTWRITEBYTECODE"


def run(params: BenchParams, progress: pairs.Progress) -> Report:
    """Start each engine in a process of its own, in turn, with the file in the page cache."""
    progress("process start to first token")
    peaks: dict[str, list[float]] = {name: [] for name in _ENGINES}
    # At least one uncounted round: it brings file and libraries into the page cache, and compiles.
    plan = pairs.Plan(reps=params.reps, warmup=max(1, params.warmup), pause_s=params.pause_s)
    with tempfile.TemporaryDirectory() as compiled:
        runners = {name: _runner(engine, params, peaks[name], compiled)
                   for name, engine in _ENGINES.items()}  # fmt: skip
        times = pairs.alternate(runners, plan, progress)
    memory = {
        name: Series(values=tuple(found[-params.reps :]), others=times[name].others)
        for name, found in peaks.items()
    }
    a, b = times["edgeroute"], times["llama.cpp"]
    m, n = memory["edgeroute"], memory["llama.cpp"]
    return Report(
        bench="load", params=params,
        columns=("", "edgeroute", "llama-cpp-python", "ratio", "runs"),
        rows=(("first token, s", report.spread(a, 3), report.spread(b, 3),
               f"{pairs.ratio(a, b):.3f}", report.noise(a, b)),
              ("peak resident memory", format_bytes(m.median), format_bytes(n.median),
               f"{pairs.ratio(m, n):.3f}", "")),
        results=[report.pair_result({"what": "first_token"}, "s", a, b),
                 report.pair_result({"what": "peak_rss"}, "bytes", m, n)],
        criteria=(Criterion(what="time to first token over llama-cpp-python",
                            value=pairs.ratio(a, b), limit=TARGET_TIME, at_most=True),
                  Criterion(what="peak resident memory over llama-cpp-python",
                            value=pairs.ratio(m, n), limit=TARGET_MEMORY, at_most=True)),
        notes=(f"page cache warm; n_ctx {N_CTX}; prompt {PROMPT!r}; flash attention on in both",),
    )  # fmt: skip


def _runner(
    engine: str, params: BenchParams, peaks: list[float], compiled: str
) -> Callable[[], float]:
    def measure() -> float:
        seconds, peak = start(engine, params, compiled)
        peaks.append(float(peak))
        return seconds

    return measure


def start(engine: str, params: BenchParams, compiled: str) -> tuple[float, int]:
    """Run one engine in a process; return (seconds to the first token, peak resident bytes).

    Args:
        engine: its package.
        params: model and threads.
        compiled: a folder for the bytecode of all modules, see `_environment`.

    Raises:
        EdgerouteError: the process failed; the message has its last words.
    """
    script = Path(__file__).with_name("child.py")
    # -P keeps the script's own folder off the module path, where names could be shadowed.
    command = [sys.executable, "-P", str(script), engine, str(params.path), PROMPT, str(N_CTX),
               str(params.threads)]  # fmt: skip
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        began = time.perf_counter()
        with subprocess.Popen(
            command, env=_environment(compiled), text=True, stdout=subprocess.PIPE, stderr=log
        ) as process:
            try:
                assert process.stdout is not None
                first = process.stdout.readline()
                seconds = time.perf_counter() - began
                rest = process.stdout.read()
            except BaseException:
                process.kill()
                raise
        log.seek(0)
        errors = log.read()
    if process.returncode or not first.strip() or not rest.strip():
        raise EdgerouteError(f"{engine} in a process of its own failed with status "
                             f"{process.returncode}: {errors.strip()[-2000:]}")  # fmt: skip
    return seconds, int(json.loads(rest.splitlines()[-1])["peak_rss_bytes"])


def _environment(compiled: str) -> dict[str, str]:
    """Let the child find the same edgeroute as this process, installed or not, and compile once.

    An installed package has bytecode; a working tree has none where PYTHONDONTWRITEBYTECODE is
    set, or where it may not be written, and then every start would compile 120 modules.
    """
    home = str(Path(edgeroute.__file__).parent.parent)
    known = os.environ.get("PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if name != _NO_BYTECODE}
    return kept | {"PYTHONPATH": home + (os.pathsep + known if known else ""),
                   "PYTHONPYCACHEPREFIX": compiled}  # fmt: skip
