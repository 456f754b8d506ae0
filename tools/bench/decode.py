"""Greedy decoding, one sequence: Runtime.generate against a loop of llama_decode and argmax."""

from edgeroute.runtime.cells import round_cells
from edgeroute.runtime.errors import UsageError
from edgeroute.tools.bench import pairs, report
from edgeroute.tools.bench.ceiling import bytes_per_token, read_bandwidth
from edgeroute.tools.bench.engines import Ours, Theirs
from edgeroute.tools.bench.peer import PeerParams
from edgeroute.tools.bench.report import BenchParams, Criterion, Report
from edgeroute.tools.bench.workers import Respawned

CONTEXTS = (64, 1024)
TARGET_RATIO = 0.98
MIN_TOKENS = 2


def run(
    params: BenchParams, progress: pairs.Progress, contexts: tuple[int, ...] = CONTEXTS
) -> Report:
    """Measure tokens per second after the first, at each length of context.

    Ours is the whole path: queue, scheduler, sampler and text; theirs is the bare loop.
    """
    n_ctx = round_cells(max(contexts) + params.tokens)
    settings = PeerParams(n_ctx=n_ctx, threads=params.threads)
    bandwidth = read_bandwidth(params.threads)
    rows, results, criteria = [], [], []
    ours = Respawned(Ours, params.path, {"threads": params.threads, "n_ctx": n_ctx})
    theirs = Respawned(Theirs, params.path, settings)
    for n_past in contexts:
        progress(f"decode {params.tokens} tokens after {n_past}")
        n_tokens, a, b = _measure(ours, theirs, n_past, params, progress)
        n_bytes = bytes_per_token(params.path, n_past + n_tokens // 2)
        what: dict[str, object] = {"context": n_past, "n_tokens": n_tokens}
        results.append(report.pair_result(what, "tok/s", a, b) | {
            "bytes_per_token": n_bytes,
            "ceiling_tok_s": report.plain(bandwidth / n_bytes),
        })  # fmt: skip
        found = pairs.ratio(a, b)
        rows.append((f"{n_past} + {n_tokens}", report.spread(a), report.spread(b),
                     f"{found:.3f}", f"{bandwidth / n_bytes:.1f}",
                     report.noise(a, b)))  # fmt: skip
        criteria.append(Criterion(what=f"decode at context {n_past} over llama_decode",
                                  value=found, limit=TARGET_RATIO))  # fmt: skip
    return Report(
        bench="decode", params=params, rows=tuple(rows), results=results, criteria=tuple(criteria),
        columns=("context", "edgeroute tok/s", "llama.cpp tok/s", "ratio", "ceiling tok/s", "runs"),
        notes=(f"ceiling: {bandwidth / 1e9:.1f} GB/s read from memory with "
               f"--threads {params.threads}, over the bytes that a token needs",),
    )  # fmt: skip


def _measure(
    ours: Respawned, theirs: Respawned, n_past: int, params: BenchParams, progress: pairs.Progress
) -> tuple[int, pairs.Series, pairs.Series]:
    """Decode the same number of tokens with both: as many as the model gives before it ends."""
    prompt = ours.call("text", n_past)
    n_tokens = ours.call("decode", prompt, params.tokens)[1]
    if n_tokens < MIN_TOKENS:
        raise UsageError(f"the model ends after {n_tokens} tokens at context {n_past}; this "
                         f"benchmark needs {MIN_TOKENS}; use another model")  # fmt: skip
    warm = ("decode", prompt[:32], 8)
    measured = pairs.alternate({
        "edgeroute": lambda: float(ours.call("decode", prompt, n_tokens, warm=warm)[0]),
        "llama.cpp": lambda: float(theirs.call("decode", prompt, n_tokens, warm=warm)[0]),
    }, params.plan, progress)  # fmt: skip
    return n_tokens, measured["edgeroute"], measured["llama.cpp"]
