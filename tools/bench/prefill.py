"""A prompt in one batch: Runtime.generate's prefill against one llama_decode."""

import time

from edgeroute.engine import Runtime
from edgeroute.runtime.kv_cache import round_cells
from edgeroute.tools.bench import pairs, report
from edgeroute.tools.bench.peer import Peer, PeerParams
from edgeroute.tools.bench.report import BenchParams, Criterion, Report
from edgeroute.tools.bench.text import text_tokens

N_PROMPT = 512
TARGET_RATIO = 0.98


def run(params: BenchParams, progress: pairs.Progress, n_prompt: int = N_PROMPT) -> Report:
    """Measure prompt tokens per second, logits of the last token included."""
    n_ctx = round_cells(n_prompt + 1)
    settings = PeerParams(n_ctx=n_ctx, threads=params.threads)
    plan = pairs.Plan(reps=params.reps, warmup=params.warmup, pause_s=params.pause_s)
    with (
        Runtime(params.path, threads=params.threads, n_ctx=n_ctx) as runtime,
        Peer(params.path, settings) as peer,
    ):
        progress(f"prefill of {n_prompt} tokens")
        prompt = text_tokens(runtime.encode, n_prompt)

        def ours() -> float:
            answer = runtime.generate(
                prompt_ids=prompt, max_tokens=1, temperature=0.0, prefix="off"
            )
            return answer.stats.prefill_tok_s

        def theirs() -> float:
            peer.clear()
            began = time.perf_counter()
            peer.prefill(prompt)
            return n_prompt / (time.perf_counter() - began)

        measured = pairs.alternate({"edgeroute": ours, "llama.cpp": theirs}, plan, progress)
    a, b = measured["edgeroute"], measured["llama.cpp"]
    found = pairs.ratio(a, b)
    return Report(
        bench="prefill", params=params,
        columns=("prompt", "edgeroute tok/s", "llama.cpp tok/s", "ratio", "runs"),
        rows=((str(n_prompt), report.spread(a), report.spread(b), f"{found:.3f}",
               report.noise(a, b)),),
        results=[report.pair_result({"n_prompt": n_prompt}, "tok/s", a, b)],
        criteria=(Criterion(what=f"prefill of {n_prompt} tokens over llama_decode", value=found,
                            limit=TARGET_RATIO),),
    )  # fmt: skip
