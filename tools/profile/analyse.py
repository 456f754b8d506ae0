"""From a trace to a profile: every figure that `edgeroute profile` prints, draws and writes."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edgeroute.offload.locality import sch_interval, srp, srp_by_layer, srp_interval
from edgeroute.offload.replay_live import LiveReplay, replay_live
from edgeroute.offload.reuse import reuse_distances, working_set
from edgeroute.offload.routes import Routes, loads, routes_of
from edgeroute.offload.segment_cache import SegmentCache
from edgeroute.offload.skew import domain_overlap, skew
from edgeroute.offload.trace import Mark, Record, StepPaging, Trace, TraceReader, TraceStep
from edgeroute.runtime.board import board
from edgeroute.runtime.errors import UsageError
from edgeroute.tools.profile.advise import Memory, advise
from edgeroute.tools.profile.hits import DEFAULT_ACTIVE, MAX_REQUESTS, decode_part, hit_rates
from edgeroute.tools.profile.live import live_of
from edgeroute.tools.profile.predictors import predictor_rows
from edgeroute.tools.profile.record import Progress, Recorded
from edgeroute.tools.profile.records import (
    Interval,
    Locality,
    Profile,
    Reuse,
    Skew,
    Subject,
)
from edgeroute.tools.profile.where import this_machine

SEGMENTS: Final = (4, 16, 64, 256)
SCH_SEGMENTS: Final = (16, 64)
RHOS: Final = (1.0, 1.5, 2.0, 3.0)
BY_LAYER: Final = 16
"""Segment length that is shown layer by layer."""
MAX_IDS: Final = 16_000_000
"""Experts chosen, over all tokens and layers, that are held at once: 32 MB."""

UNKNOWN_MACHINE: Final = "unknown: a trace does not say where it was made"
_GATE_NOTE: Final = (
    "the gate's own prediction (prefetch=gate) needs hidden states, which a trace has not: only "
    "predictors that see routes are replayed, and `random` and `popularity` are their controls"
)
_COLD_NOTE: Final = (
    "hit rates are of decoding from empty slots, first uses counted as misses; a longer run has "
    "fewer of those, and a Runtime's slots are also filled by prompts"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What is known of the model beside its trace. Nothing of it is needed."""

    arch: str = "unknown architecture"
    file_bytes: int = 0
    slot_bytes: int | None = None
    """Of one expert in memory, in the mean."""
    fixed_bytes: int | None = None
    """What all but the experts takes."""
    trace: str | None = None
    notes: tuple[str, ...] = ()


def load(path: Path, most: int = MAX_IDS) -> tuple[Trace, bool]:
    """Read a trace as a stream, up to so many ids; the flag tells that more follows.

    Raises:
        TraceError: it is no trace, or a record contradicts its header.
        UsageError: it cannot be read.
    """
    steps: list[TraceStep] = []
    kept: list[Record] = []
    n_ids, more = 0, False
    try:
        with TraceReader(path) as reader:
            for record in reader:
                if isinstance(record, TraceStep):
                    n_ids += record.flat.size
                    if more := n_ids > most:
                        break
                    steps.append(record)
                else:
                    kept.append(record)
    except OSError as error:
        raise UsageError(f"cannot read the trace {path}: {error.strerror or error}") from error
    return Trace(
        meta=reader.meta, steps=tuple(steps), truncated=reader.truncated,
        marks=tuple(each for each in kept if isinstance(each, Mark)),
        paging=tuple(each for each in kept if isinstance(each, StepPaging)),
        live=tuple(each for each in kept if not isinstance(each, TraceStep | Mark | StepPaging)),
    ), more  # fmt: skip


def analyse(path: Path, about: About, progress: Progress, run: Recorded | None = None) -> Profile:
    """Compute a profile of a trace's file.

    Args:
        path: the trace.
        about: the model, as far as it is there.
        progress: told of the longer parts.
        run: what recorded it, if that was just now.

    Raises:
        TraceError: it is no trace.
        UsageError: it has no decoded token, or cannot be read.
    """
    trace, more = load(path, MAX_IDS)
    part = decode_part(trace, MAX_REQUESTS)
    if not part.steps:
        raise UsageError(f"{path.name} has no decoded token; record some with --tokens")
    compared = replay_live(path)
    live = live_of(trace, run, compared.equal)
    routes = routes_of(trace)
    hits = hit_rates(part, DEFAULT_ACTIVE if live is None else live.policy, progress)
    memory = Memory(slot_bytes=about.slot_bytes or trace.meta.page_bytes,
                    fixed_bytes=about.fixed_bytes)  # fmt: skip
    notes = [*about.notes, *_trace_notes(trace, part, compared, more=more), _COLD_NOTE, _GATE_NOTE]
    return Profile(
        subject=_subject(trace, routes, about, here=run is not None),
        live=live,
        hits=hits,
        reuse=_reuse(part, routes),
        locality=_locality(routes, trace, progress),
        skew=_skew(routes, trace.meta.n_expert),
        predictors=tuple(predictor_rows(part)),
        advice=advise(part, hits, memory, progress),
        notes=tuple(notes),
    )  # fmt: skip


def _subject(trace: Trace, routes: Sequence[Routes], about: About, *, here: bool) -> Subject:
    meta = trace.meta
    n_decode = sum(max(step.sizes) for step in trace.steps if not step.prefill)
    n_prefill = sum(max(step.sizes) for step in trace.steps if step.prefill)
    return Subject(
        model=meta.model, file_bytes=about.file_bytes, arch=about.arch, n_layer=meta.n_layer,
        n_moe_layer=len(meta.layers), n_expert=meta.n_expert, n_expert_used=meta.n_expert_used,
        page_bytes=meta.page_bytes, n_page=len(meta.layers) * meta.n_expert,
        n_prompt_token=n_prefill // meta.n_expert_used,
        n_decode_token=n_decode // meta.n_expert_used,
        machine=this_machine() if here else UNKNOWN_MACHINE,
        power_mode=board().power_mode if here else None,
        when=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), trace=about.trace,
        domains=tuple(dict.fromkeys(one.label for one in routes if one.label)),
    )  # fmt: skip


def _trace_notes(trace: Trace, part: Trace, compared: LiveReplay, *, more: bool) -> Iterator[str]:
    if more:
        yield (f"only the trace's first {len(trace.steps)} steps are analysed, {MAX_IDS} choices; "
               "it goes on")  # fmt: skip
    if trace.truncated:
        yield "the trace's file ends inside a record, which is left out"
    n_decode = sum(not step.prefill for step in trace.steps)
    if len(part.steps) < n_decode:
        yield (f"hit rates are replays of {len(part.steps)} of the {n_decode} decoded tokens, the "
               "first ones after each prompt")  # fmt: skip
    if compared.equal is None:
        yield f"the replay cannot be compared with the live run: {compared.reason}"
    elif not compared.equal:
        yield f"the replay differs from the live run: {compared.reason}"


def _reuse(part: Trace, routes: Sequence[Routes]) -> Reuse:
    found = reuse_distances(part)
    sets = working_set(routes, part.meta.n_expert)
    return Reuse(distances=found.bounds, shares=found.shares, cold=found.cold, working_set=sets)


def _locality(routes: Sequence[Routes], trace: Trace, progress: Progress) -> Locality:
    meta = trace.meta
    longest = max(one.n_token for one in routes)
    lengths = [m for m in SEGMENTS if m <= longest]
    jobs = [(m, rho) for m in SCH_SEGMENTS if m <= longest for rho in RHOS
            if rho * meta.n_expert_used < meta.n_expert]  # fmt: skip
    n_all, rhos = len(lengths) + len(jobs), {}
    values: dict[int, Interval] = {}
    for i, m in enumerate(lengths):
        estimate = srp_interval(routes, meta.n_expert, m)
        values[m] = Interval(value=estimate.value, low=estimate.low, high=estimate.high)
        rhos[m] = srp(routes, meta.n_expert, m).rho
        progress("locality", i + 1, n_all)
    found = []
    for i, (m, rho) in enumerate(jobs):
        sch = _sch(routes, SegmentCache(n_expert=meta.n_expert, m=m, rho=rho,
                                        n_expert_used=meta.n_expert_used))  # fmt: skip
        if sch is not None:
            found.append((m, rho, sch))
        progress("locality", len(lengths) + i + 1, n_all)
    return Locality(
        srp=values, srp_rho=rhos, srp_by_layer=_by_layer(routes, meta.n_expert), sch=tuple(found)
    )


def _sch(routes: Sequence[Routes], cache: SegmentCache) -> Interval | None:
    """Estimate SCH; None where the cache never fills, so that nothing is charged."""
    try:
        found = sch_interval(routes, cache)
    except UsageError:
        return None
    return Interval(value=found.value, low=found.low, high=found.high)


def _by_layer(routes: Sequence[Routes], n_expert: int) -> dict[int, tuple[float, ...]]:
    """SRP layer by layer, at the usual length, or a shorter one if some layer has few tokens."""
    layers = {il for one in routes for il in one.ids}
    longest = min(max(len(one.ids.get(il, ())) for one in routes) for il in layers)
    fitting = [m for m in SEGMENTS if m <= min(longest, BY_LAYER)]
    if not fitting:
        return {}
    found = srp_by_layer(routes, n_expert, fitting[-1])
    return {fitting[-1]: tuple(found[il].value for il in sorted(found))}


def _skew(routes: Sequence[Routes], n_expert: int) -> Skew:
    found, counts = skew(routes, n_expert), loads(routes, n_expert)
    domains = domain_overlap(routes, n_expert)
    several = len(domains.domains) > 1
    return Skew(
        layers=found.layers, top_shares=found.top_shares, load_sd=found.load_sd,
        domains=domains.domains if several else (),
        overlap=domains.overlap if several else (),
        loads=tuple(tuple(row) for row in counts.tolist()),
    )  # fmt: skip
