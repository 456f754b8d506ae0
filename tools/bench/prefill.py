"""A prompt in one batch: Runtime.generate's prefill against one llama_decode."""

from edgeroute.runtime.cells import round_cells
from edgeroute.tools.bench import pairs, report
from edgeroute.tools.bench.engines import Ours, Theirs
from edgeroute.tools.bench.peer import PeerParams
from edgeroute.tools.bench.report import BenchParams, Criterion, Report
from edgeroute.tools.bench.workers import Respawned

N_PROMPT = 512
TARGET_RATIO = 0.98


def run(params: BenchParams, progress: pairs.Progress, n_prompt: int = N_PROMPT) -> Report:
    """Measure prompt tokens per second, logits of the last token included."""
    n_ctx = round_cells(n_prompt + 1)
    settings = PeerParams(n_ctx=n_ctx, threads=params.threads)
    ours = Respawned(Ours, params.path, {"threads": params.threads, "n_ctx": n_ctx})
    theirs = Respawned(Theirs, params.path, settings)
    progress(f"prefill of {n_prompt} tokens")
    prompt = ours.call("text", n_prompt)
    warm = ("prefill", prompt[: n_prompt // 4])
    measured = pairs.alternate({
        "edgeroute": lambda: float(ours.call("prefill", prompt, warm=warm)),
        "llama.cpp": lambda: float(theirs.call("prefill", prompt, warm=warm)),
    }, params.plan, progress)  # fmt: skip
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
