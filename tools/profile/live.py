"""What the recorded run itself did, read from its trace and, where it was just made, beside it."""

from collections.abc import Iterable
from dataclasses import replace

from edgeroute.offload.trace import StepPaging, Trace
from edgeroute.tools.profile.record import Recorded
from edgeroute.tools.profile.records import Live


def live_of(
    trace: Trace, run: Recorded | None = None, replay_equal: bool | None = None
) -> Live | None:
    """Sum the paging of a trace's decode steps; None where it has none, as in version 1.

    Speeds of a trace without its run are those of the passes over the model alone.
    """
    decode = [record for record in trace.paging if not trace.steps[record.step].prefill]
    if not trace.pools or not decode:
        return None
    pools, n = trace.pools[-1].pools, len(decode)
    asked = sum(each.hits + each.late + each.misses for each in decode)
    found = Live(
        policy="+".join(sorted({pool.policy for pool in pools})),
        n_slots=sum(pool.n_slots for pool in pools),
        slots_bytes=sum(pool.n_slots * pool.slot_bytes for pool in pools),
        budget_bytes=0 if run is None else run.budget_bytes,
        hit_ratio=sum(each.hits for each in decode) / asked if asked else 0.0,
        demand_bytes_token=sum(each.demand_bytes for each in decode) / n,
        prefetch_bytes_token=sum(each.prefetch_bytes for each in decode) / n,
        stall_s_token=sum(each.stall_s for each in decode) / n,
        decode_tok_s=_rate(n, decode),
        prefill_tok_s=_prefill_tok_s(trace),
        replay_equal=replay_equal,
    )
    return found if run is None else _with_run(found, run)


def _with_run(live: Live, run: Recorded) -> Live:
    """Take the whole answers' speeds and energy."""
    joules = run.joules / run.n_decode_token if run.energy_source and run.n_decode_token else None
    return replace(
        live,
        decode_tok_s=run.decode_tok_s or live.decode_tok_s,
        prefill_tok_s=run.prefill_tok_s or live.prefill_tok_s,
        joules_token=joules,
        energy_source=run.energy_source,
        energy_estimated=run.energy_estimated,
    )


def _prefill_tok_s(trace: Trace) -> float:
    prefill = [record for record in trace.paging if trace.steps[record.step].prefill]
    # The last layer computes fewer tokens than the others.
    n = sum(max(trace.steps[record.step].sizes) for record in prefill)
    return _rate(n // trace.meta.n_expert_used, prefill)


def _rate(n: int, steps: Iterable[StepPaging]) -> float:
    seconds = sum(each.seconds for each in steps)
    return n / seconds if seconds > 0 else 0.0
