"""Four sequences decoding together, against llama.cpp's batched decode of four."""

from edgeroute.runtime.cells import round_cells
from edgeroute.tools.bench import pairs, report
from edgeroute.tools.bench.engines import Ours, Theirs
from edgeroute.tools.bench.peer import PeerParams
from edgeroute.tools.bench.report import BenchParams, Criterion, Report
from edgeroute.tools.bench.text import shifted
from edgeroute.tools.bench.workers import Respawned

N_STREAMS, N_PROMPT = 4, 64
OURS, ALONE = "edgeroute", "edgeroute, one sequence"
SPLIT, UNIFIED = "llama.cpp, a cache each", "llama.cpp, one cache"


def run(params: BenchParams, progress: pairs.Progress, n_streams: int = N_STREAMS) -> Report:
    """Measure tokens per second in sum while all sequences decode."""
    n_ctx, n_tokens = round_cells(N_PROMPT + params.tokens), params.tokens
    settings = {"threads": params.threads, "n_ctx": n_ctx, "n_kv": n_ctx * n_streams,
                "max_batch": n_streams}  # fmt: skip
    split, unified = (
        PeerParams(n_ctx=n_ctx * n_streams, threads=params.threads, n_seq=n_streams, kv_unified=u)
        for u in (False, True)
    )
    ours = Respawned(Ours, params.path, settings)
    a_cache_each = Respawned(Theirs, params.path, split)
    one_cache = Respawned(Theirs, params.path, unified)
    progress(f"{n_streams} sequences of {N_PROMPT} + {n_tokens} tokens")
    prompts = shifted(ours.call("text", N_PROMPT * 2), n_streams, N_PROMPT)
    warm = ("decode", prompts[0][:32], 8)

    def together(engine: Respawned, some: list[list[int]]) -> float:
        return float(engine.call("together", some, n_tokens, warm=warm))

    measured = pairs.alternate({
        OURS: lambda: together(ours, prompts),
        SPLIT: lambda: together(a_cache_each, prompts),
        UNIFIED: lambda: together(one_cache, prompts),
        ALONE: lambda: together(ours, prompts[:1]),
    }, params.plan, progress)  # fmt: skip
    return _report(params, n_streams, measured)


def _report(params: BenchParams, n_streams: int, measured: dict[str, pairs.Series]) -> Report:
    ours, alone = measured[OURS], measured[ALONE]
    best = max((SPLIT, UNIFIED), key=lambda name: measured[name].median)
    result = report.pair_result({"n_streams": n_streams, "peer": best}, "tok/s in sum", ours,
                                measured[best])  # fmt: skip
    return Report(
        bench="batch", params=params, columns=("", "tok/s in sum", "edgeroute over it", "runs"),
        rows=tuple(
            (name, report.spread(each), f"{pairs.ratio(ours, each):.3f}", report.noise(each))
            for name, each in measured.items()
        ),
        results=[result | {"all": {name: each.to_dict() for name, each in measured.items()},
                           "batch_over_single": report.plain(pairs.ratio(ours, alone))}],
        criteria=(Criterion(what=f"{n_streams} sequences over llama.cpp's better batched decode",
                            value=pairs.ratio(ours, measured[best]), limit=1.0),),
    )  # fmt: skip
