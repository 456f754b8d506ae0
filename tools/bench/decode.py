"""Greedy decoding, one sequence: Runtime.generate against a loop of llama_decode and argmax."""

import time
from collections.abc import Callable

import numpy as np

from edgeroute.engine import Runtime
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.kv_cache import round_cells
from edgeroute.stats import GenerationStats
from edgeroute.tools.bench import pairs, report
from edgeroute.tools.bench.ceiling import bytes_per_token, measured_bandwidth
from edgeroute.tools.bench.peer import Peer, PeerParams
from edgeroute.tools.bench.report import BenchParams, Criterion, Report
from edgeroute.tools.bench.text import text_tokens

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
    plan = pairs.Plan(reps=params.reps, warmup=params.warmup, pause_s=params.pause_s)
    rows, results, criteria = [], [], []
    with (
        Runtime(params.path, threads=params.threads, n_ctx=n_ctx) as runtime,
        Peer(params.path, settings) as peer,
    ):
        for n_past in contexts:
            progress(f"decode {params.tokens} tokens after {n_past}")
            prompt = text_tokens(runtime.encode, n_past)
            ours = _Ours(runtime, prompt, params.tokens)
            n_tokens = ours.count()
            measured = pairs.alternate(
                {"edgeroute": ours, "llama.cpp": _theirs(peer, prompt, n_tokens)}, plan, progress
            )
            a, b = measured["edgeroute"], measured["llama.cpp"]
            n_bytes = bytes_per_token(params.path, n_past + n_tokens // 2)
            ceiling = measured_bandwidth() / n_bytes
            what: dict[str, object] = {"context": n_past, "n_tokens": n_tokens}
            results.append(report.pair_result(what, "tok/s", a, b) | {
                "bytes_per_token": n_bytes,
                "ceiling_tok_s": report.plain(ceiling),
            })  # fmt: skip
            rows.append((f"{n_past} + {n_tokens}", report.spread(a), report.spread(b),
                         f"{pairs.ratio(a, b):.3f}", f"{ceiling:.1f}", report.noise(a, b)))  # fmt: skip
            criteria.append(Criterion(what=f"decode at context {n_past} over llama_decode",
                                      value=pairs.ratio(a, b), limit=TARGET_RATIO))  # fmt: skip
    return Report(
        bench="decode", params=params, rows=tuple(rows), results=results, criteria=tuple(criteria),
        columns=("context", "edgeroute tok/s", "llama.cpp tok/s", "ratio", "ceiling tok/s", "runs"),
        notes=(f"ceiling: bytes per token over {measured_bandwidth() / 1e9:.1f} GB/s measured",),
    )  # fmt: skip


class _Ours:
    """Decodes a prompt's continuation; returns tokens per second after the first."""

    def __init__(self, runtime: Runtime, prompt: list[int], n_tokens: int) -> None:
        self._runtime, self._prompt, self._n_tokens = runtime, prompt, n_tokens

    def count(self) -> int:
        """Tokens until the model ends by itself or `n_tokens` are there: both must do as many."""
        found = self._generate().n_generated
        if found < MIN_TOKENS:
            raise UsageError(
                f"the model ends after {found} tokens here; this benchmark needs {MIN_TOKENS}"
            )
        return found

    def __call__(self) -> float:
        return self._generate().decode_tok_s

    def _generate(self) -> GenerationStats:
        return self._runtime.generate(
            prompt_ids=self._prompt, max_tokens=self._n_tokens, temperature=0.0, seed=1,
            prefix="off",
        ).stats  # fmt: skip


def _theirs(peer: Peer, prompt: list[int], n_tokens: int) -> Callable[[], float]:
    def measure() -> float:
        peer.clear()
        token = int(np.argmax(peer.prefill(prompt)))
        began = time.perf_counter()
        for i in range(n_tokens - 1):
            token = int(np.argmax(peer.step(token, len(prompt) + i)))
        return (n_tokens - 1) / (time.perf_counter() - began)

    return measure
