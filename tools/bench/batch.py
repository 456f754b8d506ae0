"""Four sequences decoding together, against llama.cpp's batched decode of four."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from edgeroute.engine import Runtime
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.kv_cache import round_cells
from edgeroute.tools.bench import pairs, report
from edgeroute.tools.bench.peer import Peer, PeerParams
from edgeroute.tools.bench.report import BenchParams, Criterion, Report
from edgeroute.tools.bench.text import shifted, text_tokens

N_STREAMS, N_PROMPT = 4, 64
OURS, ALONE = "edgeroute", "edgeroute, one sequence"
SPLIT, UNIFIED = "llama.cpp, a cache each", "llama.cpp, one cache"


def run(
    params: BenchParams, progress: pairs.Progress, n_streams: int = N_STREAMS
) -> Report:
    """Measure tokens per second in sum while all sequences decode."""
    n_ctx = round_cells(N_PROMPT + params.tokens)
    plan = pairs.Plan(reps=params.reps, warmup=params.warmup, pause_s=params.pause_s)

    def settings(unified: bool) -> PeerParams:
        return PeerParams(n_ctx=n_ctx * n_streams, threads=params.threads, n_seq=n_streams,
                          kv_unified=unified)  # fmt: skip

    with (
        Runtime(params.path, threads=params.threads, n_ctx=n_ctx, n_kv=n_ctx * n_streams,
                max_batch=max(n_streams, 2)) as runtime,
        Peer(params.path, settings(False)) as split,
        Peer(params.path, settings(True)) as unified,
    ):  # fmt: skip
        progress(f"{n_streams} sequences of {N_PROMPT} + {params.tokens} tokens")
        prompts = shifted(text_tokens(runtime.encode, N_PROMPT * 2), n_streams, N_PROMPT)
        runners = {
            OURS: lambda: joint_rate(runtime, prompts, params.tokens),
            SPLIT: _batched(split, prompts, params.tokens),
            UNIFIED: _batched(unified, prompts, params.tokens),
            ALONE: lambda: joint_rate(runtime, prompts[:1], params.tokens),
        }
        measured = pairs.alternate(runners, plan, progress)
    return _report(params, n_streams, measured)


def _report(params: BenchParams, n_streams: int, measured: dict[str, pairs.Series]) -> Report:
    ours, alone = measured[OURS], measured[ALONE]
    best = max((SPLIT, UNIFIED), key=lambda name: measured[name].median)
    found = pairs.ratio(ours, measured[best])
    rows = tuple(
        (name, report.spread(series), f"{pairs.ratio(ours, series):.3f}", report.noise(series))
        for name, series in measured.items()
    )
    result = report.pair_result({"n_streams": n_streams, "peer": best}, "tok/s in sum", ours,
                                measured[best])  # fmt: skip
    return Report(
        bench="batch", params=params, rows=rows,
        columns=("", "tok/s in sum", "edgeroute over it", "runs"),
        results=[result | {"all": {name: each.to_dict() for name, each in measured.items()},
                           "batch_over_single": report.plain(pairs.ratio(ours, alone))}],
        criteria=(Criterion(what=f"{n_streams} sequences over llama.cpp's better batched decode",
                            value=found, limit=1.0),),
    )  # fmt: skip


def joint_rate(runtime: Runtime, prompts: Sequence[list[int]], n_tokens: int) -> float:
    """Decode all prompts at once from one thread each; count while all of them decode.

    Returns:
        Tokens per second in sum, from when the last sequence has its first token until the
        first of them ends.

    Raises:
        UsageError: the sequences never decoded at the same time.
    """
    def listen(prompt: list[int]) -> list[tuple[float, int]]:
        seen = []
        for chunk in runtime.stream(prompt_ids=prompt, max_tokens=n_tokens, temperature=0.0,
                                    seed=1, prefix="off"):  # fmt: skip
            if chunk.token_ids:
                seen.append((time.perf_counter(), len(chunk.token_ids)))
        return seen

    with ThreadPoolExecutor(len(prompts)) as pool:
        streams = list(pool.map(listen, prompts))
    return overlap_rate(streams)


def overlap_rate(streams: Sequence[Sequence[tuple[float, int]]]) -> float:
    """Tokens per second over the interval in which every stream was under way.

    Each stream is a list of (time, tokens that arrived then).
    """
    if not all(streams):
        raise UsageError("a sequence produced no text; decode more tokens or use another model")
    start = max(stream[0][0] for stream in streams)
    end = min(stream[-1][0] for stream in streams)
    if end <= start:
        raise UsageError("the sequences did not overlap; decode more tokens (--tokens)")
    n_tokens = sum(n for stream in streams for at, n in stream if start < at <= end)
    return n_tokens / (end - start)


def _batched(peer: Peer, prompts: Sequence[list[int]], n_tokens: int) -> Callable[[], float]:
    def measure() -> float:
        peer.clear()
        rows = [peer.prefill(prompt, seq=seq) for seq, prompt in enumerate(prompts)]
        tokens = [int(np.argmax(row)) for row in rows]
        began = time.perf_counter()
        for i in range(n_tokens - 1):
            logits = peer.step_all(tokens, len(prompts[0]) + i)
            tokens = np.argmax(logits, axis=1).tolist()
        return len(prompts) * (n_tokens - 1) / (time.perf_counter() - began)

    return measure
