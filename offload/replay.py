"""A recorded trace through any policy, slot count and predictor.

The policies are the engine's own, and `ReplayTable` counts as its page table does, so the
counters of a replay equal those of a live run with the same steps, slots and policy, with
prefetch off and each layer's experts held at once. `replay_live` compares with a run itself.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from edgeroute.offload.counters import CounterSnapshot
from edgeroute.offload.eviction import EvictionPolicy, PolicyParams, PoolShape
from edgeroute.offload.eviction_oracle import Belady
from edgeroute.offload.eviction_registry import POLICIES, make_policy
from edgeroute.offload.prefetch import Predictor
from edgeroute.offload.replay_table import ReplayTable
from edgeroute.offload.trace_records import Trace, TraceError, pages_of
from edgeroute.runtime.errors import UsageError

BELADY = "belady"
_DEFAULT = PolicyParams()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayResult:
    """What a replay counted."""

    policy: str
    n_slots: int
    decode: CounterSnapshot
    prefill: CounterSnapshot

    @property
    def hit_ratio(self) -> float:
        """Pages of decode steps found resident / pages asked for."""
        return self.decode.total.hit_ratio


def shape_of(trace: Trace, layers: Collection[int] | None = None) -> PoolShape:
    """The pool of a trace's layers, or of some of them.

    Raises:
        UsageError: a layer that the trace has not.
    """
    meta = trace.meta
    wanted = sorted(meta.layers if layers is None else set(layers))
    if not wanted or not set(wanted) <= set(meta.layers):
        raise UsageError(f"layers {wanted} are not all among the trace's, {list(meta.layers)}")
    pages = [il * meta.n_expert + expert for il in wanted for expert in range(meta.n_expert)]
    return PoolShape(pages=pages, n_expert=meta.n_expert, page_bytes=meta.page_bytes)


Steps = list[tuple[bool, list[list[int]]]]
"""Of each step, whether it is prefill, and the distinct pages that each layer asks for."""


def steps_of(trace: Trace, layers: Collection[int] | None = None) -> Steps:
    """What a trace, or some of its layers, asks of a page table."""
    n_expert = trace.meta.n_expert
    # Numbers that all requests share: a long trace asks for few pages many times.
    numbers = list(range(n_expert * (trace.meta.layers[-1] + 1)))
    page_of = {
        layer: numbers[layer * n_expert : (layer + 1) * n_expert].__getitem__
        for layer in trace.meta.layers
        if layers is None or layer in layers
    }
    found: Steps = []
    for step in trace.steps:
        experts, at, wanted = step.flat.tolist(), 0, []
        for layer, size in zip(step.layers, step.sizes, strict=True):
            page = page_of.get(layer)
            if page is not None:
                # As `pages_of`, which is the rule.
                wanted.append(list(dict.fromkeys(map(page, experts[at : at + size]))))
            at += size
        found.append((step.prefill, wanted))
    return found


@dataclass(frozen=True, slots=True)
class _Pool:
    """A trace made ready to run several times."""

    shape: PoolShape
    steps: Steps

    def run(self, policy: str, n_slots: int, params: PolicyParams) -> ReplayResult:
        chosen: EvictionPolicy
        if policy == BELADY:
            future = (pages for prefill, wanted in self.steps if not prefill for pages in wanted)
            chosen = Belady(self.shape, future)
        else:
            chosen = make_policy(policy, self.shape, n_slots, params)
        table = ReplayTable(n_slots, chosen, self.shape)
        run_steps(table, self.steps)
        return ReplayResult(
            policy=policy,
            n_slots=n_slots,
            decode=table.decode.snapshot(),
            prefill=table.prefill.snapshot(),
        )


def replay(
    trace: Trace,
    policy: str,
    n_slots: int,
    params: PolicyParams = _DEFAULT,
    layers: Collection[int] | None = None,
) -> ReplayResult:
    """Run a trace through one pool, each page arriving at once.

    Args:
        policy: a registered name, or `belady` for the optimum.
        layers: those of one pool; None takes all that were traced as one pool.

    Raises:
        CapacityError: a layer of some step asks for more pages than there are slots.
        UsageError: no such policy, no slot, or layers that the trace has not.
    """
    shape = shape_of(trace, layers)
    pool = _Pool(shape, steps_of(trace, layers))
    return pool.run(policy, n_slots, params)


def run_steps(table: ReplayTable, steps: Steps) -> None:
    """Ask for the pages of each (prefill, pages per layer)."""
    run_step = table.run_step
    for prefill, wanted in steps:
        run_step(prefill, wanted)


def count_uses(trace: Trace) -> dict[int, int]:
    """How often each page was asked for while decoding; the hot set of `static`."""
    counts: dict[int, int] = {}
    for prefill, wanted in steps_of(trace):
        if not prefill:
            for pages in wanted:
                for page in pages:
                    counts[page] = counts.get(page, 0) + 1
    return counts


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyChoice:
    """The best online policy of a trace, and every policy's hit rate, `belady` included."""

    name: str
    hit_ratios: Mapping[str, float]


def choose_policy(
    trace: Trace,
    n_slots: int,
    names: Iterable[str] | None = None,
    params: PolicyParams = _DEFAULT,
    layers: Collection[int] | None = None,
) -> PolicyChoice:
    """Replay a trace through the registered policies and name the one with most hits.

    Ties go to the policy registered first, LRU before all. `static` counts its hot set in
    the trace's own first tokens unless `params` bring counts from another trace: counts of
    this one would be knowledge of its future.

    Prefill is left out.

    Raises:
        CapacityError: a layer of some step asks for more pages than there are slots.
        UsageError: the trace has no decode step, no such policy or layers, or no slot.
    """
    steps = [step for step in steps_of(trace, layers) if not step[0]]
    if not steps:
        raise UsageError("a policy is chosen by a trace's decode steps; this trace has none")
    pool = _Pool(shape_of(trace, layers), steps)
    wanted = list(POLICIES if names is None else names)
    ratios = {name: pool.run(name, n_slots, params).hit_ratio for name in (*wanted, BELADY)}
    best = max(wanted, key=lambda name: ratios[name])  # max keeps the first of equals
    return PolicyChoice(name=best, hit_ratios=ratios)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recall:
    """How much of what was needed a predictor named, at so many pages per layer."""

    n_needed: int
    n_predicted: int
    n_right: int

    @property
    def recall(self) -> float:
        """Predicted and needed / needed; 0 when nothing was."""
        return self.n_right / self.n_needed if self.n_needed else 0.0

    @property
    def precision(self) -> float:
        """Predicted and needed / predicted; 0 when nothing was."""
        return self.n_right / self.n_predicted if self.n_predicted else 0.0


def replay_predictor(trace: Trace, predictor: Predictor, n_pages: int) -> Recall:
    """Ask a predictor at each layer for the next one's best `n_pages`, and count.

    Layers that nothing can be predicted for (the first of a step) do not count.

    Raises:
        TraceError: the trace has no decode step with two layers.
    """
    n_needed = n_predicted = n_right = 0
    n_expert = trace.meta.n_expert
    for step in trace.steps:
        if step.prefill:
            continue
        predictor.begin_step()
        guessed: set[int] | None = None
        for layer, ids in step.parts():
            experts = ids.tolist()
            if guessed is not None:
                needed = set(pages_of(layer, experts, n_expert))
                n_needed += len(needed)
                n_predicted += len(guessed)
                n_right += len(needed & guessed)
            ranked = predictor.predict(layer, experts, None)
            guessed = {guess.page for guess in ranked[:n_pages]}
    if not n_needed:
        raise TraceError("a predictor is judged by decode steps of two layers; there is none")
    return Recall(n_needed=n_needed, n_predicted=n_predicted, n_right=n_right)
