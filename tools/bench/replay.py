"""How quickly a trace is replayed through a policy, on one core."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from edgeroute.offload.replay import BELADY, ReplayResult, replay
from edgeroute.offload.trace import Trace, TraceMeta, TraceStep, read_trace
from edgeroute.runtime.errors import UsageError
from edgeroute.tools.bench.pairs import Progress
from edgeroute.tools.bench.report import BenchParams, Criterion, Report, plain

POLICIES: Final = ("lru", "lfu", "lfru", BELADY)
LIMITS_S: Final = {"lru": 10.0, BELADY: 30.0}
"""For as many events as LIMIT_EVENTS; other numbers in proportion."""
LIMIT_EVENTS: Final = 1_000_000
_KEEP: Final = 0.9
"""How far a token's scores follow those of the token before."""
_POPULARITY: Final = 1.2
"""Spread of what an expert's score is in the mean, over the spread in time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayParams:
    """What is replayed.

    Attributes:
        trace: a recorded file; None makes routes up, of the shape below.
        n_event: routing events: what one token chooses in one layer.
        share: slots over pages.
    """

    trace: Path | None = None
    n_event: int = LIMIT_EVENTS
    share: float = 0.25
    n_layer: int = 48
    n_expert: int = 128
    n_expert_used: int = 8
    policies: tuple[str, ...] = POLICIES


def drifting_trace(params: ReplayParams, seed: int = 1) -> Trace:
    """Make routes up: popular experts and less popular ones, and scores that drift.

    Raises:
        UsageError: fewer events than one token has.
    """
    shape = params.n_layer, params.n_expert
    if params.n_event < params.n_layer or params.n_expert_used >= params.n_expert:
        raise UsageError(
            f"{params.n_event} events of {params.n_layer} layers with {params.n_expert_used} of "
            f"{params.n_expert} experts are no trace; take at least one token's"
        )
    meta = TraceMeta(
        model="drifting routes", n_layer=params.n_layer, n_expert=params.n_expert,
        n_expert_used=params.n_expert_used, page_bytes=1 << 20,
        layers=tuple(range(params.n_layer)),
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    popularity = rng.normal(size=shape) * _POPULARITY
    scores = rng.normal(size=shape)
    sizes = (params.n_expert_used,) * params.n_layer
    steps = []
    for _ in range(params.n_event // params.n_layer):
        scores = _KEEP * scores + (1 - _KEEP**2) ** 0.5 * rng.normal(size=shape)
        best = np.argpartition(-(popularity + scores), params.n_expert_used, axis=1)
        flat = best[:, : params.n_expert_used].reshape(-1).astype(np.uint16)
        steps.append(TraceStep(prefill=False, layers=meta.layers, sizes=sizes, flat=flat))
    return Trace(meta=meta, steps=tuple(steps))


def bench(params: BenchParams, how: ReplayParams, progress: Progress) -> Report:
    """Time a replay through each policy, from the trace in memory to the counters.

    Raises:
        UsageError: the file is no trace, or one without decode steps.
        CapacityError: a step needs more slots than the share gives.
    """
    progress("making routes" if how.trace is None else f"reading {how.trace.name}")
    trace = drifting_trace(how) if how.trace is None else read_trace(how.trace)
    n_event = sum(len(step.layers) for step in trace.steps if not step.prefill)
    if not n_event:
        raise UsageError("the trace has no decode step to replay; record an answer, not a prompt")
    n_slots = max(1, int(how.share * len(trace.meta.layers) * trace.meta.n_expert))
    found: dict[str, tuple[float, ReplayResult]] = {}
    for policy in how.policies:
        progress(f"{policy}, {n_event} routing events")
        began = time.perf_counter()
        result = replay(trace, policy, n_slots)
        found[policy] = time.perf_counter() - began, result
    return _report(params, n_event, found)


def _report(
    params: BenchParams, n_event: int, found: dict[str, tuple[float, ReplayResult]]
) -> Report:
    rows, results = [], []
    for policy, (seconds, result) in found.items():
        n_request = result.decode.total.requests
        rows.append((
            policy, f"{result.n_slots}", f"{n_event}", f"{n_request}", f"{seconds:.2f}",
            f"{result.hit_ratio:.4f}",
        ))  # fmt: skip
        results.append({
            "policy": policy, "n_slots": result.n_slots, "n_event": n_event,
            "n_request": n_request, "seconds": plain(seconds), "hit_ratio": result.hit_ratio,
        })  # fmt: skip
    return Report(
        bench="replay", params=params, timed=False, rows=tuple(rows), results=results,
        columns=("policy", "slots", "events", "pages asked for", "seconds", "hit ratio"),
        criteria=tuple(
            Criterion(what=f"{policy}, seconds for {LIMIT_EVENTS} events", limit=limit,
                      value=found[policy][0] * LIMIT_EVENTS / n_event, at_most=True)
            for policy, limit in LIMITS_S.items()
            if policy in found
        ),
    )  # fmt: skip
