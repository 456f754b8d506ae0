"""How often an expert will be found in memory: from a trace of the model, or of models like it."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from edgeroute.offload.eviction_cliff import CycleShape, check_cliff
from edgeroute.offload.replay import replay
from edgeroute.offload.trace import Trace
from edgeroute.runtime.errors import CapacityError, UsageError
from edgeroute.tools.forecast.model_cost import PageShape
from edgeroute.tools.forecast.records import HitModel, Range

DEFAULT_POLICY: Final = "lfru"
SHARES: Final = (0.03, 0.06, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9)
"""Shares of all experts in memory at which a trace is replayed."""
TRACE_SPREAD: Final = 0.04
"""What another prompt of the same model changes, as far as seen."""
STATED_SPREAD, UNKNOWN_SPREAD = 0.12, 0.18
STATED: Final = ((0.033, 0.27), (0.22, 0.741), (0.23, 0.76), (0.40, 0.82))
STATED_SOURCE: Final = (
    "gpt-oss-120b with 2 of 60 GB 27 %, Qwen3-30B-A3B with 4 of 17.3 GB 76 % (BMoE, on phones); "
    "35B-A3B with 2,267 of 10,240 experts 74 % (FreeToken #231); 128 experts with 40 % of them "
    "82 % (LFRU, a trace study); by routing locality of the family (arXiv 2505.16056, SRP at 16)"
)
"""What users and papers report: (share of the experts in memory, hit ratio)."""
WARM_TOKENS: Final = 32
"""Most decoded tokens of a trace that are left out: they find the slots cold."""
LOCALITY: Final = {
    "qwen3moe": 0.541, "olmoe": 0.509, "gpt-oss": 0.509, "llama": 0.494, "deepseek2": 0.379,
    "deepseek": 0.369, "qwen2moe": 0.337,
}  # fmt: skip
"""SRP at 16 tokens of models of a family. Source: arXiv 2505.16056; gpt-oss is not among them and
is taken for like OLMoE. Those of `STATED` are of the kind with 0.541."""
FULL_LOCALITY: Final = 0.541


def hit_model(trace: Trace | None, shape: PageShape, arch: str = "") -> HitModel:
    """Make a curve of hit ratio by the share of experts in memory.

    Args:
        trace: routes of this model; None where there is none.
        shape: its experts.
        arch: its family, for what is published of such.

    Raises:
        UsageError: the trace is of a model of another shape, or has no decode step.
    """
    return _stated(shape, arch) if trace is None else _measured(trace, shape)


def with_pace(model: HitModel, trace: Trace, shape: PageShape) -> HitModel:
    """Add how long the tokens of a run took that was recorded on this machine.

    Args:
        model: made from that trace.
        trace: whole, with what its steps cost.
        shape: the model's experts.

    Returns:
        The model as it is where the trace does not say.
    """
    steps = trace.steps
    spent = [each.seconds for each in trace.paging if not steps[each.step].prefill]
    spent = spent[min(len(spent) // 3, WARM_TOKENS) :]
    if not trace.pools or not spent:
        return model
    n_slots = sum(pool.n_slots for pool in trace.pools[-1].pools)
    ratio = hit_ratio(model, n_slots / shape.n_pages).likely
    return replace(model, pace=(ratio, statistics.fmean(spent)))


def hit_ratio(model: HitModel, share: float) -> Range:
    """Read a curve at a share (0 to 1): never likelier to hit less than uniform routing would,
    unless that was measured.
    """
    share = min(1.0, max(0.0, share))
    likely = _interpolate(((0.0, 0.0), *model.curve, (1.0, 1.0)), share)
    if share >= 1.0:
        return Range(low=1.0, likely=1.0, high=1.0)
    floor = 0.0 if model.origin == "measured" else min(share, likely)
    return Range(
        low=max(floor, likely - model.spread), likely=likely, high=min(1.0, likely + model.spread)
    )


def policy_of(n_slots: int, shape: PageShape) -> str:
    """The policy that the store takes by itself for so many slots.

    Raises:
        CapacityError: they do not hold one layer's experts of a token.
    """
    if n_slots >= shape.cycle_pages:
        return DEFAULT_POLICY
    return check_cliff(n_slots, _cycle(shape)).fallback or DEFAULT_POLICY


def _cycle(shape: PageShape) -> CycleShape:
    return CycleShape(
        n_layer=shape.n_layer, n_expert=shape.n_expert, n_expert_used=shape.n_expert_used
    )


def _measured(trace: Trace, shape: PageShape) -> HitModel:
    """Replay a trace at several sizes, by the policy that the store would have there."""
    meta = trace.meta
    found = (len(meta.layers), meta.n_expert, meta.n_expert_used)
    if found != (shape.n_layer, shape.n_expert, shape.n_expert_used):
        raise UsageError(
            f"the trace is of a model with {found[0]} layers of {found[1]} experts, {found[2]} "
            f"used; this one has {shape.n_layer} of {shape.n_expert}, {shape.n_expert_used} used"
        )
    if all(step.prefill for step in trace.steps):
        raise UsageError("the trace has no decode step; record a longer answer")
    curve = []
    for share in (shape.cycle_pages / shape.n_pages, *SHARES):
        n_slots = math.ceil(share * shape.n_pages)
        try:
            ratio = _warm_ratio(trace, policy_of(n_slots, shape), n_slots)
        except CapacityError:  # a prompt's step needs more pages of one layer at once
            continue
        curve.append((n_slots / shape.n_pages, ratio))
    return HitModel(curve=tuple(sorted(set(curve))), origin="measured", spread=TRACE_SPREAD,
                    source=f"replay of {len(trace.steps)} steps of {meta.model[:80]}")  # fmt: skip


def _warm_ratio(trace: Trace, policy: str, n_slots: int) -> float:
    """Hit ratio of a trace's decode steps but the first ones, which find the slots cold."""
    steps = trace.steps
    decode = [i for i, step in enumerate(steps) if not step.prefill]
    cut = decode[min(len(decode) // 3, WARM_TOKENS)]
    whole = replay(trace, policy, n_slots).decode.total
    if cut == decode[0]:
        return whole.hit_ratio
    cold = replay(replace(trace, steps=steps[:cut]), policy, n_slots).decode.total
    hits, misses = whole.hits - cold.hits, whole.misses - cold.misses
    return hits / max(1, hits + misses)


def _stated(shape: PageShape, arch: str) -> HitModel:
    """Scale published hit ratios between uniform routing and models of great locality."""
    factor = min(1.0, LOCALITY.get(arch, FULL_LOCALITY) / FULL_LOCALITY)
    curve = [(share, share + factor * (ratio - share)) for share, ratio in STATED]
    cycle = shape.cycle_pages / shape.n_pages
    curve = [(share, ratio) for share, ratio in curve if share >= cycle]
    # Below one token's cycle no recency helps: the store then keeps a part of it for good, which
    # the next token uses again as often as it uses the same experts.
    curve.append((cycle / 2, factor * FULL_LOCALITY / 2))
    return HitModel(
        curve=tuple(sorted(curve)), origin="stated",
        spread=STATED_SPREAD if arch in LOCALITY else UNKNOWN_SPREAD, source=STATED_SOURCE,
    )  # fmt: skip


def _interpolate(points: Sequence[tuple[float, float]], at: float) -> float:
    """Read a rising curve between two of its points."""
    low = max((point for point in points if point[0] <= at), default=points[0])
    high = min((point for point in points if point[0] >= at), default=points[-1])
    if high[0] <= low[0]:
        return low[1]
    return low[1] + (high[1] - low[1]) * (at - low[0]) / (high[0] - low[0])
