"""A trace against itself: its routes through the recorded pools, and what those counted live.

Where prefetch was off, the page tables do again, request by request, what they did in the run,
so every counter must be the same number. Where something else decided, such as a prefetch
that came in time or not, that is said and nothing is claimed.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from edgeroute.offload.counters import CounterSnapshot, LayerCount, total
from edgeroute.offload.eviction import PoolShape
from edgeroute.offload.eviction_registry import POLICIES, make_policy
from edgeroute.offload.expert_turns import TurnParams, Turns, replay_turns
from edgeroute.offload.page_table import PageTable
from edgeroute.offload.trace_file import TraceReader
from edgeroute.offload.trace_records import (
    Counted,
    Mark,
    Pools,
    PoolState,
    Record,
    StepPaging,
    Trace,
    TraceMeta,
    TraceStep,
    pages_of,
)
from edgeroute.runtime.errors import CapacityError


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveReplay:
    """What came of a comparison.

    Attributes:
        equal: whether each number was the same; None where they cannot be compared.
        reason: why they were not, or cannot be; "" where they were.
        n_steps: steps whose counters were compared, all of them the same.
        n_counted: full sets of counters, layer by layer, that were compared likewise.
        decode, prefill: what the replay counted up to there, all runs of the file together.
    """

    equal: bool | None
    reason: str
    n_steps: int
    n_counted: int
    decode: LayerCount
    prefill: LayerCount


class _Stopped(Exception):
    """The comparison ends: `equal` as in LiveReplay."""

    def __init__(self, equal: bool | None, reason: str) -> None:
        super().__init__(reason)
        self.equal, self.reason = equal, reason


def replay_live(source: Trace | str | os.PathLike[str]) -> LiveReplay:
    """Replay the recorded pools of a trace and compare with the live counters that it holds.

    A file is read as a stream. Of a run that died, all steps are compared up to its end.

    Raises:
        TraceError: the file is no trace, or a record contradicts its header.
        OSError: it cannot be read.
    """
    if isinstance(source, Trace):
        return _compare(source.meta, source.records())
    with TraceReader(source) as reader:
        return _compare(reader.meta, reader)


def _compare(meta: TraceMeta, records: Iterable[Record]) -> LiveReplay:
    work = _Work(meta)
    equal: bool | None = True
    reason = ""
    try:
        for record in records:
            work.take(record)
        if not work.n_steps:
            raise _Stopped(None, "it holds no step of a live run whose pools are known")
    except _Stopped as stopped:
        equal, reason = stopped.equal, stopped.reason
    decode, prefill = work.totals()
    return LiveReplay(
        equal=equal, reason=reason, n_steps=work.n_steps, n_counted=work.n_counted,
        decode=decode, prefill=prefill,
    )  # fmt: skip


class _Work:
    """Tables of the run at hand, and how far the comparison has come."""

    def __init__(self, meta: TraceMeta) -> None:
        self.meta = meta
        self.n_steps = self.n_counted = 0
        self._pools: Pools | None = None
        self._tables: list[PageTable] = []
        self._step: TraceStep | None = None
        self._past = LayerCount(), LayerCount()  # of runs before this one

    def take(self, record: Record) -> None:
        """Replay a record, or compare with it.

        Raises:
            _Stopped: they differ, or nothing can be said from here on.
        """
        if isinstance(record, TraceStep):
            if self._pools is None:
                raise _Stopped(None, "it has no pools: no paged run recorded it, or version 1 did")
            self._check_paged()
            self._step = record
        elif isinstance(record, StepPaging):
            step, self._step = self._step, None
            if step is not None:
                self._replay(step, record)
        elif isinstance(record, Pools):
            self._change(record)
        elif isinstance(record, Counted):
            self._check_paged()
            self._compare(record)
        else:
            assert isinstance(record, Mark)  # says nothing of pages

    def _check_paged(self) -> None:
        if self._step is not None:
            raise _Stopped(None, f"nothing is known of the paging in step {self.n_steps}")

    def _change(self, record: Pools) -> None:
        for state in record.pools:
            if state.policy not in POLICIES:
                raise _Stopped(None, f"no eviction policy is called {state.policy!r} here")
        if record.begins or self._pools is None:
            self._past, self._step = self.totals(), None
            self._tables = [_table(state, self.meta) for state in record.pools]
        elif [state.layers for state in record.pools] != [s.layers for s in self._pools.pools]:
            raise _Stopped(None, "its pools got other layers while it ran")
        else:
            self._check_paged()
            for table, state in zip(self._tables, record.pools, strict=True):
                _adapt(table, state)
        self._pools = record

    def _replay(self, step: TraceStep, paging: StepPaging) -> None:
        assert self._pools is not None
        number = f"step {paging.step}"
        if paging.is_broken:
            raise _Stopped(None, f"reads failed or were stopped in {number}")
        if paging.prefetch_bytes or paging.late:
            raise _Stopped(None, f"prefetch brought pages in {number}; record with prefetch=off")
        before = _sums(self._tables)
        try:
            self._run(step, paging)
        except CapacityError as error:
            raise _Stopped(False, f"{number} does not fit the recorded slots: {error}") from error
        spent = _sums(self._tables) - before
        live = Counter(hits=paging.hits, misses=paging.misses, demand_bytes=paging.demand_bytes)
        if +spent != +live:
            raise _Stopped(
                False, f"in {number} the run counted {dict(+live)}, its replay {dict(+spent)}"
            )
        self.n_steps += 1

    def _run(self, step: TraceStep, paging: StepPaging) -> None:
        assert self._pools is not None
        params = TurnParams(group_bytes=self._pools.group_bytes, n_ahead=self._pools.n_ahead)
        n_expert = self.meta.n_expert
        pool_of = {
            layer: (table, state)
            for table, state in zip(self._tables, self._pools.pools, strict=True)
            for layer in state.layers
        }
        for table in self._tables:
            table.begin_step(step.prefill)
        for place, (layer, ids) in enumerate(step.parts()):
            table, state = pool_of[layer]
            experts = ids.tolist()
            if place in paging.turns:
                turns = Turns(
                    first=layer * n_expert, page_bytes=state.page_bytes,
                    counts=dict(sorted(Counter(experts).items())), most=paging.most,
                )  # fmt: skip
                replay_turns(table, turns, params)
                continue
            pages = pages_of(layer, experts, n_expert)
            for one in table.acquire(pages)[1]:
                table.loaded(one.page)
            table.release(pages)

    def _compare(self, record: Counted) -> None:
        for number, (table, live) in enumerate(zip(self._tables, record.pools, strict=True)):
            pairs = zip(("decode", "prefill"), (table.decode, table.prefill), live, strict=True)
            for kind, counters, told in pairs:
                for layer, (ours, theirs) in enumerate(
                    zip(_timeless(counters.snapshot()), _timeless(told), strict=True)
                ):
                    if ours != theirs:
                        raise _Stopped(
                            False,
                            f"before step {record.step} pool {number} had counted other numbers in "
                            f"{kind} of layer {layer} than its replay: {theirs}, not {ours}",
                        )
        self.n_counted += 1

    def totals(self) -> tuple[LayerCount, LayerCount]:
        """What all tables counted, decode and prefill, runs before this one included."""
        decode = [table.decode.snapshot().total for table in self._tables]
        prefill = [table.prefill.snapshot().total for table in self._tables]
        return total([self._past[0], *decode]), total([self._past[1], *prefill])


def _table(state: PoolState, meta: TraceMeta) -> PageTable:
    n = meta.n_expert
    pages = [layer * n + expert for layer in sorted(state.layers) for expert in range(n)]
    shape = PoolShape(pages=pages, n_expert=n, page_bytes=state.page_bytes)
    return PageTable(state.n_slots, make_policy(state.policy, shape, state.n_slots), shape)


def _adapt(table: PageTable, state: PoolState) -> None:
    """Give a table other slots, or another policy, as the live run did."""
    if state.policy != table.policy.name:
        table.set_policy(make_policy(state.policy, table.shape, table.n_slots))
    if state.n_slots != table.n_slots:
        table.resize(state.n_slots)


def _sums(tables: Iterable[PageTable]) -> Counter[str]:
    found: Counter[str] = Counter()
    for table in tables:
        for counters in (table.decode, table.prefill):
            found["hits"] += sum(counters.hits)
            found["misses"] += sum(counters.misses)
            found["demand_bytes"] += sum(counters.demand_bytes)
    return found


def _timeless(counted: CounterSnapshot) -> Iterator[LayerCount]:
    """Counters without seconds, which no replay can know."""
    return (replace(layer, stall_s=0.0) for layer in counted.layers)
